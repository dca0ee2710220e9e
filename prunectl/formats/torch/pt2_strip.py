"""A copy of an exported program without the inputs that it was exported with."""

from __future__ import annotations

from pathlib import Path

from prunectl.errors import InputError
from prunectl.formats.base import ModelFile, Role
from prunectl.formats.stripping import Part, Removed, Wish
from prunectl.formats.torch.pt2 import examples
from prunectl.formats.writing import write_flat
from prunectl.formats.zip_write import rebuild
from prunectl.formats.zips import open_archive


def strip(model: ModelFile, wish: Wish, targets: dict[Path, Path]) -> tuple[Removed, ...]:
    """Write a copy whose example inputs are empty, as PyTorch saves a program that has none; return what went."""
    if wish.is_half:
        raise InputError(
            f"{model.path} is an exported program, whose graph says of which type its weights are",
            hint="leave out --half, or export a model in half precision",
        )
    if Part.MASKS in wish.parts and any(tensor.role is Role.MASK for tensor in model.tensors):
        raise InputError(
            f"{model.path} is an exported program, whose graph multiplies its weights by masks",
            hint="strip the rest with --only examples, or strip the model before it is exported",
        )
    archive = open_archive(model.path)
    found = examples(archive) if Part.EXAMPLES in wish.parts else ()
    if not found:
        write_flat(model, targets, ())
        return ()
    rebuild(archive, targets[model.path], {entry.name: (0, ()) for entry in found})
    return tuple(Removed(entry.name.rpartition("data/")[2], Part.EXAMPLES, entry.extent.nbytes) for entry in found)
