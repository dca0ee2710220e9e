"""A `.keras` archive with some numbers changed: spliced, or its weights inflated, changed and deflated again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from prunectl.formats import zip_write
from prunectl.formats.base import ModelFile
from prunectl.formats.keras import h5_write
from prunectl.formats.keras.archive import WEIGHTS, inflate
from prunectl.formats.scratch import temporary_folder
from prunectl.formats.writing import Rewrite
from prunectl.formats.zips import open_archive

_PIECE_BYTES = 1 << 20


def write(model: ModelFile, targets: dict[Path, Path], rewrites: Sequence[Rewrite]) -> None:
    """Write the archive with new numbers in it."""
    if all(rewrite.tensor.storage.extent is not None for rewrite in rewrites):
        zip_write.write(model, targets, rewrites)
        return
    archive = open_archive(model.path)
    with temporary_folder() as scratch:
        inside = inflate(archive, dict(model.about.keras or {}), scratch / WEIGHTS)
        own = {tensor.storage.key: tensor for tensor in inside.tensors}
        changed = scratch / "changed.h5"
        inner = [replace(rewrite, tensor=own[rewrite.tensor.storage.key]) for rewrite in rewrites]
        h5_write.write(inside, {inside.path: changed}, inner)
        with changed.open("rb") as weights:
            pieces = iter(partial(weights.read, _PIECE_BYTES), b"")
            zip_write.rebuild(archive, targets[model.path], {WEIGHTS: (changed.stat().st_size, pieces)})
