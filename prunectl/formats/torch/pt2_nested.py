"""Exported programs of PyTorch 2.1 to 2.8, whose weights torch.save wrote: a zip inside the zip."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from prunectl.errors import InputError
from prunectl.formats import zips
from prunectl.formats.base import Role, Tensor
from prunectl.formats.torch import model as torch_model
from prunectl.formats.torch import zip_file
from prunectl.formats.torch.pt2_graph import parameters
from prunectl.formats.zips import Archive

PROGRAM = "serialized_exported_program.json"
"""The graph of a program of PyTorch 2.7 or earlier, which has no folders."""
EXAMPLES = "serialized_example_inputs.pt"
_PARTS = ("serialized_state_dict", "serialized_constants")


def tensors(archive: Archive, graph: dict[str, Any]) -> Iterator[Tensor]:
    """Yield the tensors of a program of PyTorch 2.7 or earlier."""
    for part in _PARTS:
        # PyTorch 2.1 called them .json, although they were none.
        name = next((f"{part}{end}" for end in (".pt", ".json") if f"{part}{end}" in archive.entries), "")
        if not name:
            raise InputError(f"{archive.path} is damaged: it has no entry {part}.pt")
        yield from inside(archive, name, graph)


def inside(archive: Archive, name: str, graph: dict[str, Any]) -> Iterator[Tensor]:
    """Yield the tensors of one entry that torch.save wrote."""
    entry = archive.entries[name]
    if not entry.nbytes:
        return
    if not entry.is_stored:
        raise InputError(
            f"{archive.path} compresses its entry {name}, a zip inside the zip",
            hint="load it with PyTorch and save it with torch.export.save, or zip it again without compression",
        )
    inner = zips.open_inside(archive, entry)
    if any(not found.is_stored for found in inner.entries.values()):
        raise InputError(f"{archive.path} compresses what lies in its entry {name}, a zip inside the zip")
    source = zip_file.source(inner, zip_file.top_folder(inner), "data")
    found, _ = torch_model.tensors(archive.path, source, {})
    trained = parameters(graph)
    for tensor in found:
        role = tensor.role if tensor.name in trained or not graph else Role.STATE
        storage = replace(tensor.storage, key=f"{name}!{tensor.storage.key}")
        yield replace(tensor, role=role, storage=storage)
