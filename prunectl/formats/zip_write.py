"""A zip with some numbers changed: spliced and its checksums mended, or deflated again where it was."""

from __future__ import annotations

import io
import mmap
import os
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

from prunectl.formats.base import ModelFile
from prunectl.formats.extents import Extent
from prunectl.formats.patch import TensorUpdate, copy_with_patches
from prunectl.formats.zip_read import Archive, FileWindow, ZipEntry, open_archive, open_inside, written_again

LEVEL = 6
_EPOCH = (1980, 1, 1, 0, 0, 0)
"""The same time for every entry (extra records hold times too), or the same model would not give the same bytes."""
FORMAT_VERSION_ENTRY = "/.format_version"
"""With it PyTorch promises itself where each record lies, which no longer holds."""


def pack(model: ModelFile, target: Path, tick: Callable[[int], None]) -> None:
    """Write a zip again, entry by entry in the same order."""
    archive = open_archive(model.path)
    with ZipFile(model.path) as old, ZipFile(target, "w", ZIP_DEFLATED, compresslevel=LEVEL) as packed:
        packed.comment = old.comment
        for name in old.namelist():
            if name.endswith(FORMAT_VERSION_ENTRY):
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


_HEADER, _CENTRAL, _DESCRIPTOR = b"PK\x03\x04", b"PK\x01\x02", b"PK\x07\x08"
_CENTRAL_BYTES = 46
_HAS_DESCRIPTOR = 1 << 3
_PIECE_BYTES = 1 << 20


def write(model: ModelFile, targets: dict[Path, Path], rewrites: Sequence[TensorUpdate]) -> None:
    """Write the archive with new numbers in it."""
    archive = open_archive(model.path)
    target = targets[model.path]
    if all(rewrite.tensor.storage.extent is not None for rewrite in rewrites):
        copy_with_patches(model.path, target, sorted(rewrites, key=lambda rewrite: rewrite.run.offset))
        offsets = [rewrite.run.offset for rewrite in rewrites]
        touched = _touched(archive.entries.values(), offsets)
        for outer in touched:
            # A zip in the zip has checksums of its own, and is itself guarded by one.
            if _is_zip(outer) and _is_around(outer, rewrites):
                fix_crcs(target, _touched(open_inside(archive, outer).entries.values(), offsets), outer.extent)
        fix_crcs(target, touched)
    else:
        changed = {rewrite.tensor.storage.key: (rewrite.tensor.storage.nbytes, rewrite.raw()) for rewrite in rewrites}
        rewrite_zip(archive, target, changed)


def fix_crcs(path: Path, entries: Iterable[ZipEntry], within: Extent | None = None) -> None:
    """Mend the CRC-32 of entries whose bytes have changed: in the directory, and beside the bytes."""
    records = _records(path, within)
    with path.open("r+b") as file:
        for entry in entries:
            crc = _crc(file.fileno(), entry).to_bytes(4, "little")
            record, flags, header_offset = records[entry.name]
            os.pwrite(file.fileno(), crc, record + 16)
            if flags & _HAS_DESCRIPTOR:
                end = entry.extent.offset + entry.extent.nbytes
                signed = os.pread(file.fileno(), 4, end) == _DESCRIPTOR
                os.pwrite(file.fileno(), crc, end + (4 if signed else 0))
            else:
                os.pwrite(file.fileno(), crc, header_offset + 14)


def _touched(entries: Iterable[ZipEntry], offsets: Iterable[int]) -> list[ZipEntry]:
    """Return the entries that hold any of these places."""
    ordered = sorted(entries, key=lambda entry: entry.extent.offset)
    begins = [entry.extent.offset for entry in ordered]
    indices = {bisect_right(begins, offset) - 1 for offset in offsets}
    return [ordered[index] for index in sorted(indices) if index >= 0]


def _is_zip(entry: ZipEntry) -> bool:
    with entry.extent.path.open("rb") as file:
        return os.pread(file.fileno(), len(_HEADER), entry.extent.offset) == _HEADER


def _is_around(entry: ZipEntry, rewrites: Sequence[TensorUpdate]) -> bool:
    inside = [rewrite for rewrite in rewrites if entry.extent.offset <= rewrite.run.offset < _end(entry)]
    return any(rewrite.tensor.storage.extent != entry.extent for rewrite in inside)


def _end(entry: ZipEntry) -> int:
    return entry.extent.offset + entry.extent.nbytes


def _crc(fd: int, entry: ZipEntry) -> int:
    crc, offset, end = 0, entry.extent.offset, entry.extent.offset + entry.extent.nbytes
    while offset < end:
        piece = os.pread(fd, min(_PIECE_BYTES, end - offset), offset)
        crc, offset = zlib.crc32(piece, crc), offset + len(piece)
    return crc


def _records(path: Path, within: Extent | None) -> dict[str, tuple[int, int, int]]:
    """Return where each entry's record lies in the directory, its flags, and where its header lies."""
    base, nbytes = (within.offset, within.nbytes) if within is not None else (0, path.stat().st_size)
    with FileWindow(path, base, nbytes) as part, ZipFile(io.BufferedReader(part)) as archive:
        offset = base + archive.start_dir
        infos = archive.infolist()
    records = {}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for info in infos:
            if data[offset : offset + 4] != _CENTRAL:
                raise ValueError(f"{path} has no record at {offset}")
            records[info.filename] = (offset, info.flag_bits, base + info.header_offset)
            lengths = (int.from_bytes(data[offset + at : offset + at + 2], "little") for at in (28, 30, 32))
            offset += _CENTRAL_BYTES + sum(lengths)
    return records


def rewrite_zip(
    archive: Archive, target: Path, changed: Mapping[str, tuple[int, Iterable[bytes | memoryview]]]
) -> None:
    """Write an archive again, compressed where it was, with other bytes (so many of them) in some entries."""
    with ZipFile(archive.path) as old, ZipFile(target, "w", compresslevel=LEVEL) as new:
        new.comment = old.comment
        for before in old.infolist():
            if before.filename.endswith(FORMAT_VERSION_ENTRY):
                continue
            info = written_again(before)
            if before.is_dir():
                new.writestr(info, b"")
                continue
            entry = archive.entries[before.filename]
            info.compress_type = ZIP_STORED if entry.is_stored else ZIP_DEFLATED
            info.file_size, content = changed.get(entry.name, (entry.nbytes, archive.pieces(entry)))
            with new.open(info, "w") as out:
                out.writelines(content)
