"""A `.keras` archive with some numbers changed: spliced, or its weights inflated, changed and deflated again."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

from prunectl.formats import zip_write
from prunectl.formats.base import ModelFile
from prunectl.formats.keras import h5_write
from prunectl.formats.keras.archive import WEIGHTS, inflate
from prunectl.formats.pack_zip import LEVEL
from prunectl.formats.writing import Rewrite
from prunectl.formats.zips import Archive, open_archive


def write(model: ModelFile, targets: dict[Path, Path], rewrites: Sequence[Rewrite]) -> None:
    """Write the archive with new numbers in it."""
    if all(rewrite.tensor.storage.extent is not None for rewrite in rewrites):
        zip_write.write(model, targets, rewrites)
        return
    archive = open_archive(model.path)
    with tempfile.TemporaryDirectory(prefix="prunectl-") as scratch:
        inside = inflate(archive, dict(model.about.keras or {}), Path(scratch) / WEIGHTS)
        own = {tensor.storage.key: tensor for tensor in inside.tensors}
        changed = Path(scratch) / "changed.h5"
        inner = [replace(rewrite, tensor=own[rewrite.tensor.storage.key]) for rewrite in rewrites]
        h5_write.write(inside, {inside.path: changed}, inner)
        _put(archive, targets[model.path], changed)


def _put(archive: Archive, target: Path, weights: Path) -> None:
    """Write the archive again around other weights, compressed where it was."""
    with ZipFile(archive.path) as old, ZipFile(target, "w", compresslevel=LEVEL) as new:
        for entry in archive.entries.values():
            info = ZipInfo(entry.name, old.getinfo(entry.name).date_time)
            info.compress_type = ZIP_STORED if entry.is_stored else ZIP_DEFLATED
            with new.open(info, "w", force_zip64=True) as out:
                if entry.name == WEIGHTS:
                    with weights.open("rb") as file:
                        shutil.copyfileobj(file, out)
                else:
                    out.writelines(archive.pieces(entry))
