"""A `.keras` archive with some numbers changed: spliced, or its weights inflated, changed and deflated again.

Or with the folders of its layers numbered anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from prunectl.formats import budgets, zip_write
from prunectl.formats.base import ModelFile
from prunectl.formats.json_text import parse_object
from prunectl.formats.keras import h5_edit, h5_write, hdf5
from prunectl.formats.keras.archive import WEIGHTS, inflate
from prunectl.formats.keras.edits import Edits
from prunectl.formats.keras.hdf5_walk import Place
from prunectl.formats.keras.numbering import folders_today, slots_of
from prunectl.formats.scratch import temporary_folder
from prunectl.formats.writing import Rewrite
from prunectl.formats.zips import Archive, open_archive

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
        _rebuild(archive, changed, targets[model.path])


def renumber(path: Path, target: Path) -> bool:
    """Write an archive of an older Keras with its layers in the folders of today; False where they are there already.

    Keras 2.12 to 2.15 call the list of layers by another name, and the first two count layers with weights twice.
    """
    archive = open_archive(path)
    config = parse_object(archive.read("config.json", budgets.MAX_JSON_BYTES), path, "its config.json")
    with temporary_folder() as scratch:
        weights, renamed = scratch / WEIGHTS, scratch / "renamed.h5"
        with weights.open("wb") as file:
            file.writelines(archive.pieces(archive.entries[WEIGHTS]))
        contents = hdf5.read_contents(Place(weights, 0, weights.stat().st_size))
        today = folders_today(config, slots_of(config, contents.datasets))
        moves = {old: new for old, new in today.items() if old != new}
        if not moves:
            return False
        h5_edit.edit(weights, renamed, Edits(moves=moves), contents, path)
        _rebuild(archive, renamed, target)
    return True


def _rebuild(archive: Archive, weights: Path, target: Path) -> None:
    with weights.open("rb") as file:
        pieces = iter(partial(file.read, _PIECE_BYTES), b"")
        zip_write.rebuild(archive, target, {WEIGHTS: (weights.stat().st_size, pieces)})
