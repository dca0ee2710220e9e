"""A safetensors file with masks, named as torch.nn.utils.prune names them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.formats.base import Array, ModelFile, Tensor
from prunectl.formats.extents import blocks
from prunectl.formats.json_text import parse_object
from prunectl.formats.safetensors import DTYPES, LENGTH_BYTES
from prunectl.training.wrap.masks import MASK, ORIGINAL, masked
from prunectl.training.wrap.wrapping import Wrapping

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_ROUND_BYTES = 8


@dataclass(frozen=True, slots=True)
class _Written:
    name: str
    tensor: Tensor
    """Says the type and the shape."""
    blocks: Callable[[], Iterator[Array]]


def wrap(model: ModelFile, wrapping: Wrapping, target: Path) -> tuple[str, ...]:
    """Write the copy; every weight gets its mask."""
    masks = masked(model, wrapping.masks)
    written: list[_Written] = []
    for tensor in model.tensors:
        name, mask = tensor.name, masks.get(tensor.name)
        written.append(_Written(name if mask is None else name + ORIGINAL, tensor, _as_it_was(tensor)))
        if mask is not None:
            written.append(_Written(name + MASK, tensor, _given(mask)))
    # Wide numbers first, as the format's own library has it: each then begins at a multiple of its width.
    written.sort(key=lambda one: -one.tensor.dtype.itemsize)
    header = _header(model, written)
    with target.open("xb") as out:
        out.write(len(header).to_bytes(LENGTH_BYTES, "little") + header)
        for one in written:
            for block in one.blocks():
                out.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
    return ()


def _as_it_was(tensor: Tensor) -> Callable[[], Iterator[Array]]:
    extent = tensor.storage.extent
    return lambda: blocks(extent, tensor.dtype) if extent is not None else iter(())


def _given(mask: Array) -> Callable[[], Iterator[Array]]:
    return lambda: iter([mask])


def _header(model: ModelFile, written: list[_Written]) -> bytes:
    with model.path.open("rb") as file:
        old = parse_object(file.read(int.from_bytes(file.read(LENGTH_BYTES), "little")), model.path, "its header")
    header: dict[str, Any] = {"__metadata__": old["__metadata__"]} if "__metadata__" in old else {}
    at = 0
    for one in written:
        end = at + one.tensor.nbytes
        header[one.name] = {
            "dtype": _CODES[one.tensor.dtype],
            "shape": list(one.tensor.shape),
            "data_offsets": [at, end],
        }
        at = end
    found = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return found + b" " * (-len(found) % _ROUND_BYTES)
