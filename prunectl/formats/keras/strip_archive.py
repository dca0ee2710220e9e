"""A `.keras` archive without what a trained model does not need."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

from prunectl.formats.base import ModelFile
from prunectl.formats.keras import h5_edit, hdf5, leftovers
from prunectl.formats.keras.archive import WEIGHTS
from prunectl.formats.keras.hdf5_walk import Place
from prunectl.formats.pack_zip import LEVEL
from prunectl.formats.stripping import Removed, Wish
from prunectl.formats.zips import Archive, open_archive, written_again

_CONFIG = "config.json"


def strip(model: ModelFile, wish: Wish, targets: dict[Path, Path]) -> tuple[Removed, ...]:
    """Write the archive without what the wish names, and return what went."""
    archive, target = open_archive(model.path), targets[model.path]
    with tempfile.TemporaryDirectory(prefix=".weights-", dir=target.parent) as scratch:
        weights, edited = Path(scratch) / WEIGHTS, Path(scratch) / "edited.h5"
        with weights.open("wb") as file:
            file.writelines(archive.pieces(archive.entries[WEIGHTS]))
        contents = hdf5.read_contents(Place(weights, 0, weights.stat().st_size))
        found = leftovers.find(contents, model.about.keras, wish, model.path)
        changed: dict[str, Path] = {}
        if not found.edits.is_empty:
            h5_edit.edit(weights, edited, found.edits, contents, model.path)
            changed[WEIGHTS] = edited
        if found.removed:
            changed[_CONFIG] = Path(scratch) / _CONFIG
            changed[_CONFIG].write_text(json.dumps(found.config), encoding="utf-8")
        _write(archive, target, changed)
    return (*found.edits.removed, *found.removed)


def _write(archive: Archive, target: Path, changed: Mapping[str, Path]) -> None:
    """Write the archive again with other contents for some entries, compressed where it was."""
    if not changed:
        shutil.copyfile(archive.path, target)
        return
    with ZipFile(archive.path) as old, ZipFile(target, "w", compresslevel=LEVEL) as new:
        new.comment = old.comment
        for before in old.infolist():
            info = written_again(before)
            if info.is_dir():
                new.writestr(info, b"")
                continue
            entry = archive.entries[before.filename]
            info.compress_type = ZIP_STORED if entry.is_stored else ZIP_DEFLATED
            with new.open(info, "w", force_zip64=True) as out:
                if entry.name in changed:
                    with changed[entry.name].open("rb") as file:
                        shutil.copyfileobj(file, out)
                else:
                    out.writelines(archive.pieces(entry))
