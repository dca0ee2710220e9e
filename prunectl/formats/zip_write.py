"""A zip with some numbers changed: spliced and its checksums mended, or deflated again where it was."""

from __future__ import annotations

import io
import mmap
import os
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

from prunectl.formats.base import ModelFile
from prunectl.formats.extents import Extent
from prunectl.formats.pack_zip import LEVEL, PROMISE
from prunectl.formats.writing import Rewrite, splice
from prunectl.formats.zips import Archive, Entry, Window, open_archive, open_inside, written_again

_HEADER, _CENTRAL, _DESCRIPTOR = b"PK\x03\x04", b"PK\x01\x02", b"PK\x07\x08"
_CENTRAL_BYTES = 46
_HAS_DESCRIPTOR = 1 << 3
_PIECE_BYTES = 1 << 20


def write(model: ModelFile, targets: dict[Path, Path], rewrites: Sequence[Rewrite]) -> None:
    """Write the archive with new numbers in it."""
    archive = open_archive(model.path)
    target = targets[model.path]
    if all(rewrite.tensor.storage.extent is not None for rewrite in rewrites):
        splice(model.path, target, sorted(rewrites, key=lambda rewrite: rewrite.run.offset))
        offsets = [rewrite.run.offset for rewrite in rewrites]
        touched = _touched(archive.entries.values(), offsets)
        for outer in touched:
            # A zip in the zip has checksums of its own, and is itself guarded by one.
            if _is_zip(outer) and _is_around(outer, rewrites):
                seal(target, _touched(open_inside(archive, outer).entries.values(), offsets), outer.extent)
        seal(target, touched)
    else:
        changed = {found.tensor.storage.key: (found.tensor.storage.nbytes, found.raw()) for found in rewrites}
        rebuild(archive, target, changed)


def seal(path: Path, entries: Iterable[Entry], within: Extent | None = None) -> None:
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


def _touched(entries: Iterable[Entry], offsets: Iterable[int]) -> list[Entry]:
    """Return the entries that hold any of these places."""
    ordered = sorted(entries, key=lambda entry: entry.extent.offset)
    begins = [entry.extent.offset for entry in ordered]
    found = {bisect_right(begins, offset) - 1 for offset in offsets}
    return [ordered[index] for index in sorted(found) if index >= 0]


def _is_zip(entry: Entry) -> bool:
    with entry.extent.path.open("rb") as file:
        return os.pread(file.fileno(), len(_HEADER), entry.extent.offset) == _HEADER


def _is_around(entry: Entry, rewrites: Sequence[Rewrite]) -> bool:
    inside = [found for found in rewrites if entry.extent.offset <= found.run.offset < _end(entry)]
    return any(found.tensor.storage.extent != entry.extent for found in inside)


def _end(entry: Entry) -> int:
    return entry.extent.offset + entry.extent.nbytes


def _crc(fd: int, entry: Entry) -> int:
    crc, at, end = 0, entry.extent.offset, entry.extent.offset + entry.extent.nbytes
    while at < end:
        piece = os.pread(fd, min(_PIECE_BYTES, end - at), at)
        crc, at = zlib.crc32(piece, crc), at + len(piece)
    return crc


def _records(path: Path, within: Extent | None) -> dict[str, tuple[int, int, int]]:
    """Return where each entry's record lies in the directory, its flags, and where its header lies."""
    base, nbytes = (within.offset, within.nbytes) if within is not None else (0, path.stat().st_size)
    with Window(path, base, nbytes) as part, ZipFile(io.BufferedReader(part)) as archive:
        at = base + archive.start_dir
        infos = archive.infolist()
    found = {}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for info in infos:
            if data[at : at + 4] != _CENTRAL:
                raise ValueError(f"{path} has no record at {at}")
            found[info.filename] = (at, info.flag_bits, base + info.header_offset)
            lengths = (int.from_bytes(data[at + place : at + place + 2], "little") for place in (28, 30, 32))
            at += _CENTRAL_BYTES + sum(lengths)
    return found


def rebuild(archive: Archive, target: Path, changed: Mapping[str, tuple[int, Iterable[bytes | memoryview]]]) -> None:
    """Write an archive again, compressed where it was, with other bytes (so many of them) in some entries."""
    with ZipFile(archive.path) as old, ZipFile(target, "w", compresslevel=LEVEL) as new:
        new.comment = old.comment
        for before in old.infolist():
            if before.filename.endswith(PROMISE):
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
