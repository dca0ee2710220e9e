"""Write a zip with new content in some entries: rewritten as a whole, or patched in place with new checksums."""

from __future__ import annotations

import io
import mmap
import os
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

from prunectl.formats.base import ModelFile
from prunectl.formats.extents import BLOCK_BYTES, Extent, FileWindow, file_chunks
from prunectl.formats.patch import TensorUpdate, copy_with_patches
from prunectl.formats.zip_read import Archive, ZipEntry, copy_info, open_archive, open_inside

LEVEL = 6
EPOCH = (1980, 1, 1, 0, 0, 0)
"""The timestamp of every new entry (without extra records, which hold times too), so that outputs are reproducible."""
FORMAT_VERSION_ENTRY = "/.format_version"
"""An entry by which PyTorch may compute the offsets of all records; left out, as a rewritten zip has other offsets."""
Content = tuple[int, Iterable[bytes | memoryview]]
"""The number of bytes of an entry, and the bytes."""


def rewrite_zip(
    archive: Archive,
    target: Path,
    changed: Mapping[str, Content],
    *,
    names: Sequence[str] = (),
    revise: Callable[[ZipInfo], object] = lambda _: None,
    alignment: int = 0,
    force_zip64: bool = False,
) -> None:
    """Rewrite an archive with new content in the `changed` entries; each entry stays compressed or stored, as it was.

    `names` lists all entries of the output, old and new ones, in their order; `revise` may edit each entry's metadata
    before it is written. With an alignment, the bytes of stored entries begin at its multiples, as in PyTorch's zips.
    """
    with ZipFile(archive.path) as old, ZipFile(target, "w", compresslevel=LEVEL) as new:
        new.comment = old.comment
        for name in names or [name for name in old.namelist() if not name.endswith(FORMAT_VERSION_ENTRY)]:
            entry = archive.entries.get(name)
            info = copy_info(old.NameToInfo[name]) if name in old.NameToInfo else ZipInfo(name, EPOCH)
            info.compress_type = ZIP_STORED if entry is None or entry.is_stored else ZIP_DEFLATED
            revise(info)
            if info.is_dir():
                new.writestr(info, b"")
                continue
            info.file_size, content = (
                changed[name] if entry is None or name in changed else (entry.nbytes, archive.pieces(entry))
            )
            if alignment and info.compress_type == ZIP_STORED:
                info.extra = _padding(new.start_dir, info, alignment)
            with new.open(info, "w", force_zip64=force_zip64) as out:
                out.writelines(content)
            if alignment:
                # The central directory needs no padding.
                info.extra = b""


_HEADER_BYTES = 30
_ZIP64_BYTES = 20
_PADDING = b"FB"


def _padding(offset: int, info: ZipInfo, alignment: int) -> bytes:
    """An extra field that aligns the bytes of an entry, as PyTorch pads them."""
    # As `zipfile` decides whether it adds 64-bit lengths to the local header.
    is_big = info.file_size * 1.05 > zipfile.ZIP64_LIMIT
    begin = offset + _HEADER_BYTES + len(info.filename.encode()) + 4 + (_ZIP64_BYTES if is_big else 0)
    fill = -begin % alignment
    return _PADDING + fill.to_bytes(2, "little") + b"Z" * fill


def file_content(path: Path) -> Content:
    """The content of a file, for an entry."""
    return path.stat().st_size, file_chunks(path)


def pack(model: ModelFile, target: Path, tick: Callable[[int], None]) -> None:
    """Write a copy of a zip with every entry deflated, in the same order."""
    archive = open_archive(model.path)

    def ticking(entry: ZipEntry) -> Iterator[bytes]:
        for piece in archive.pieces(entry):
            tick(len(piece))
            yield piece

    def revise(info: ZipInfo) -> None:
        info.date_time, info.extra = EPOCH, b""
        info.compress_type = ZIP_STORED if info.is_dir() else ZIP_DEFLATED

    content = {name: (entry.nbytes, ticking(entry)) for name, entry in archive.entries.items()}
    rewrite_zip(archive, target, content, revise=revise)


_LOCAL, _CENTRAL, _DESCRIPTOR = b"PK\x03\x04", b"PK\x01\x02", b"PK\x07\x08"
_CENTRAL_BYTES = 46
_HAS_DESCRIPTOR = 1 << 3


def write(model: ModelFile, targets: dict[Path, Path], rewrites: Sequence[TensorUpdate]) -> None:
    """Write a copy of the archive with updated tensors."""
    archive = open_archive(model.path)
    target = targets[model.path]
    if all(rewrite.tensor.storage.extent is not None for rewrite in rewrites):
        crcs: dict[Extent, int] = {}
        copy_with_patches(model.path, target, sorted(rewrites, key=lambda rewrite: rewrite.run.offset), crcs)
        offsets = [rewrite.run.offset for rewrite in rewrites]
        touched = _touched(archive.entries.values(), offsets)
        for outer in touched:
            # A zip inside the zip has checksums of its own, and its bytes count in one of the outer zip.
            if _is_zip(outer) and _is_around(outer, rewrites):
                fix_crcs(target, _touched(open_inside(archive, outer).entries.values(), offsets), crcs, outer.extent)
        fix_crcs(target, touched, crcs)
    else:
        changed = {rewrite.tensor.storage.key: (rewrite.tensor.storage.nbytes, rewrite.raw()) for rewrite in rewrites}
        rewrite_zip(archive, target, changed)


def fix_crcs(path: Path, entries: Iterable[ZipEntry], crcs: Mapping[Extent, int], within: Extent | None = None) -> None:
    """Update the CRC-32 of changed entries, in the central directory and in the local header or data descriptor.

    `crcs` has those of entries that were written as a whole; for others, the bytes are read again.
    """
    records = _records(path, within)
    with path.open("r+b") as file:
        for entry in entries:
            known = crcs.get(entry.extent)
            crc = (_crc(file.fileno(), entry) if known is None else known).to_bytes(4, "little")
            record, flags, header_offset = records[entry.name]
            os.pwrite(file.fileno(), crc, record + 16)
            if flags & _HAS_DESCRIPTOR:
                end = entry.extent.offset + entry.extent.nbytes
                signed = os.pread(file.fileno(), 4, end) == _DESCRIPTOR
                os.pwrite(file.fileno(), crc, end + (4 if signed else 0))
            else:
                os.pwrite(file.fileno(), crc, header_offset + 14)


def _touched(entries: Iterable[ZipEntry], offsets: Iterable[int]) -> list[ZipEntry]:
    """The entries that contain any of these offsets."""
    ordered = sorted(entries, key=lambda entry: entry.extent.offset)
    begins = [entry.extent.offset for entry in ordered]
    indices = {bisect_right(begins, offset) - 1 for offset in offsets}
    return [ordered[index] for index in sorted(indices) if index >= 0]


def _is_zip(entry: ZipEntry) -> bool:
    with entry.extent.path.open("rb") as file:
        return os.pread(file.fileno(), len(_LOCAL), entry.extent.offset) == _LOCAL


def _is_around(entry: ZipEntry, rewrites: Sequence[TensorUpdate]) -> bool:
    inside = [rewrite for rewrite in rewrites if entry.extent.offset <= rewrite.run.offset < _end(entry)]
    return any(rewrite.tensor.storage.extent != entry.extent for rewrite in inside)


def _end(entry: ZipEntry) -> int:
    return entry.extent.offset + entry.extent.nbytes


def _crc(fd: int, entry: ZipEntry) -> int:
    crc, offset, end = 0, entry.extent.offset, entry.extent.offset + entry.extent.nbytes
    while offset < end:
        piece = os.pread(fd, min(BLOCK_BYTES, end - offset), offset)
        crc, offset = zlib.crc32(piece, crc), offset + len(piece)
    return crc


def _records(path: Path, within: Extent | None) -> dict[str, tuple[int, int, int]]:
    """For each entry, the offset of its record in the central directory, its flags, and the offset of its header."""
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
