"""The same archive with every entry deflated, which the loaders of PyTorch and Keras read as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

from prunectl.formats.base import ModelFile
from prunectl.formats.zips import open_archive, written_again

LEVEL = 6
_EPOCH = (1980, 1, 1, 0, 0, 0)
"""The same time for every entry (extra records hold times too), or the same model would not give the same bytes."""
PROMISE = "/.format_version"
"""With it PyTorch promises itself where each record lies, which no longer holds."""


def pack(model: ModelFile, target: Path, tick: Callable[[int], None]) -> None:
    """Write a zip again, entry by entry in the same order."""
    archive = open_archive(model.path)
    with ZipFile(model.path) as old, ZipFile(target, "w", ZIP_DEFLATED, compresslevel=LEVEL) as packed:
        packed.comment = old.comment
        for name in old.namelist():
            if name.endswith(PROMISE):
                continue
            info = written_again(old.getinfo(name))
            info.date_time, info.extra = _EPOCH, b""
            if info.is_dir():
                packed.writestr(info, b"")
                continue
            entry = archive.entries[name]
            info.compress_type = ZIP_DEFLATED
            info.file_size = entry.nbytes
            with packed.open(info, "w") as out:
                for piece in archive.pieces(entry):
                    out.write(piece)
                    tick(len(piece))
