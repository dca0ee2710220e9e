"""Read zip archives by the offsets of their entries; every claim of the archive is checked."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import numpy as np
from numpy.typing import NDArray

from prunectl.errors import InputError, abbreviated, reading
from prunectl.formats.budgets import BOMB_RATIO, MAX_DEFLATE_RATIO, MAX_UNFOLDED_BYTES
from prunectl.formats.detect import refuse_long_directory
from prunectl.formats.extents import BLOCK_BYTES, Extent, FileWindow

_LOCAL_HEADER_BYTES = 30
_RECORD_BYTES, _ZIP64 = 4, b"\x01\x00"
"""Size of the header of an extra-field record, and the header id of the one with 64-bit lengths."""
_END, _LOCATOR_64, _END_64 = b"PK\x05\x06", b"PK\x06\x07", b"PK\x06\x06"
_END_BYTES, _LOCATOR_BYTES, _END_64_BYTES, _MAX_COMMENT_BYTES = 22, 20, 56, (1 << 16) - 1


@dataclass(frozen=True, slots=True)
class ZipEntry:
    """One file in a zip, and the location of its bytes."""

    name: str
    nbytes: int
    """Uncompressed size."""
    extent: Extent
    """The bytes as stored, perhaps compressed."""
    is_stored: bool
    crc: int


@dataclass(frozen=True, slots=True)
class Archive:
    """The entries of a zip, by name."""

    path: Path
    entries: Mapping[str, ZipEntry]

    def read(self, name: str, limit: int) -> bytes:
        """A whole entry of at most `limit` bytes, such as a configuration."""
        entry = self.entries[name]
        if entry.nbytes > limit:
            raise InputError(f"{self.path} is damaged: its entry {abbreviated(name)} claims {entry.nbytes} bytes")
        return b"".join(self.pieces(entry))

    def inflated(self, entry: ZipEntry) -> NDArray[np.uint8]:
        """A whole entry, decompressed into one array without further copies."""
        raw = np.empty(entry.nbytes, np.uint8)
        done = 0
        for piece in self.pieces(entry):
            raw[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
            done += len(piece)
        return raw

    def pieces(self, entry: ZipEntry) -> Iterator[bytes]:
        """Yield the decompressed bytes of an entry, checked against its size and CRC-32."""
        done, crc = 0, 0
        with self.path.open("rb") as file:
            for piece in _inflated(file, entry):
                done += len(piece)
                crc = zlib.crc32(piece, crc)
                if done > entry.nbytes:
                    break
                yield piece
        if done != entry.nbytes or crc != entry.crc:
            raise InputError(f"{self.path} is damaged: its entry {abbreviated(entry.name)} does not match its checksum")


def _inflated(file: BinaryIO, entry: ZipEntry) -> Iterator[bytes]:
    file.seek(entry.extent.offset)
    left = entry.extent.nbytes
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    while left:
        with reading(entry.extent.path):
            raw = file.read(min(BLOCK_BYTES, left))
        if not raw:
            return
        left -= len(raw)
        if entry.is_stored:
            yield raw
            continue
        try:
            while raw:
                yield inflate.decompress(raw, BLOCK_BYTES)
                raw = inflate.unconsumed_tail
        except zlib.error as error:
            raise InputError(
                f"{file.name} is damaged: its entry {abbreviated(entry.name)} cannot be decompressed"
            ) from error


def open_archive(path: Path) -> Archive:
    """Read the central directory of a zip, and refuse it if its claims are false or ambiguous."""
    return _opened(path, None)


def open_part(extent: Extent) -> Archive:
    """Read the directory of a zip that is a part of a file; the offsets of its entries are those in that file."""
    return _opened(extent.path, extent)


def open_inside(archive: Archive, entry: ZipEntry) -> Archive:
    """Read the directory of a zip that is stored in a zip; the offsets of its entries are those in the outer file."""
    return _opened(archive.path, entry.extent)


def _opened(path: Path, within: Extent | None) -> Archive:
    base = within.offset if within is not None else 0
    try:
        with (
            FileWindow(path, base, within.nbytes if within is not None else path.stat().st_size) as part,
            path.open("rb") as file,
        ):
            buffered = io.BufferedReader(part)
            refuse_long_directory(path, buffered)
            with ZipFile(buffered) as archive:
                infos = [info for info in archive.infolist() if not info.filename.endswith("/")]
                entries = [_locate(path, file, info, base) for info in infos]
            begin = min((info.header_offset for info in archive.infolist()), default=0)
            end = base + archive.start_dir
            has_one_directory = _has_one_directory(buffered)
    except (BadZipFile, NotImplementedError, UnicodeDecodeError, EOFError) as error:
        raise InputError(f"{path} is a damaged zip: {error}") from error
    except PermissionError as error:
        raise InputError(f"{path} cannot be read: permission denied") from error
    if begin:
        # A truncated zip may end with a zip that was one of its entries, whose directory is then found instead.
        raise InputError(f"{path} is truncated or damaged: there are {begin} bytes before its first entry")
    if not has_one_directory:
        raise InputError(f"{path} is refused: different readers would find different entries in it")
    _check_entries(path, entries, end)
    return Archive(path, {entry.name: entry for entry in entries})


def _has_one_directory(file: BinaryIO | io.BufferedReader) -> bool:
    """Whether all end records of a zip place its directory right before them, so that all readers find the same one.

    Python looks for the Zip64 end record in front of its locator, PyTorch at the locator's offset (CVE-2025-8291).
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - _MAX_COMMENT_BYTES - _END_BYTES - _LOCATOR_BYTES - _END_64_BYTES))
    tail = file.read()
    end = tail.rfind(_END)
    end_offset = size - len(tail) + end
    length, offset = (
        int.from_bytes(tail[end + 12 : end + 16], "little"),
        int.from_bytes(tail[end + 16 : end + 20], "little"),
    )
    locator = tail[max(end - _LOCATOR_BYTES, 0) : end]
    if locator.startswith(_LOCATOR_64):
        end -= _LOCATOR_BYTES + _END_64_BYTES
        end_offset -= _LOCATOR_BYTES + _END_64_BYTES
        if end < 0 or int.from_bytes(locator[8:16], "little") != end_offset or not tail.startswith(_END_64, end):
            return False
        length = int.from_bytes(tail[end + 40 : end + 48], "little")
        offset = int.from_bytes(tail[end + 48 : end + 56], "little")
    return offset + length == end_offset


def copy_info(old: ZipInfo) -> ZipInfo:
    """A copy of an entry's metadata for a new zip, without its sizes and compression."""
    new = ZipInfo(old.filename, old.date_time)
    new.comment, new.create_system = old.comment, old.create_system
    new.internal_attr, new.external_attr = old.internal_attr, old.external_attr
    new.extra = _without_lengths(old.extra)
    return new


def _without_lengths(extra: bytes) -> bytes:
    """Remove the record of 64-bit lengths from an extra field; `zipfile` adds a new one where needed."""
    kept, begin = b"", 0
    while begin + _RECORD_BYTES <= len(extra):
        end = begin + _RECORD_BYTES + int.from_bytes(extra[begin + 2 : begin + 4], "little")
        if extra[begin : begin + 2] != _ZIP64 and end <= len(extra):
            kept += extra[begin:end]
        begin = end
    return kept


def _locate(path: Path, file: BinaryIO, info: ZipInfo, base: int) -> ZipEntry:
    if info.compress_type not in {ZIP_STORED, ZIP_DEFLATED}:
        raise InputError(
            f"{path} compresses its entry {abbreviated(info.filename)} with a method that model files do not use"
        )
    if info.flag_bits & 1:
        raise InputError(f"{path} is encrypted")
    file.seek(max(0, base + info.header_offset))
    header = file.read(_LOCAL_HEADER_BYTES)
    if info.header_offset < 0 or len(header) < _LOCAL_HEADER_BYTES or header[:4] != b"PK\x03\x04":
        raise InputError(
            f"{path} is a damaged zip: its entry {abbreviated(info.filename)} is not where its directory says"
        )
    names_bytes = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    offset = base + info.header_offset + _LOCAL_HEADER_BYTES + names_bytes
    is_stored = info.compress_type == ZIP_STORED
    if is_stored and info.compress_size != info.file_size:
        raise InputError(f"{path} is a damaged zip: its entry {abbreviated(info.filename)} has two lengths")
    return ZipEntry(info.filename, info.file_size, Extent(path, offset, info.compress_size), is_stored, info.CRC)


def _check_entries(path: Path, entries: list[ZipEntry], end: int) -> None:
    seen: set[str] = set()
    for entry in entries:
        name = PurePosixPath(entry.name)
        if not entry.name:
            # When the archive is rewritten, `zipfile` looks at the last character of the name.
            raise InputError(f"{path} is a damaged zip: one of its entries has no name")
        if entry.name in seen:
            raise InputError(f"{path} is refused: it holds two entries named {abbreviated(entry.name)}")
        if name.is_absolute() or ".." in name.parts or "\\" in entry.name:
            raise InputError(f"{path} is refused: its entry {abbreviated(entry.name)} points out of the archive")
        if entry.nbytes > entry.extent.nbytes * MAX_DEFLATE_RATIO:
            raise InputError(
                f"{path} is refused: its entry {abbreviated(entry.name)} claims a size that deflate cannot reach"
            )
        seen.add(entry.name)
    last = 0
    for entry in sorted(entries, key=lambda item: item.extent.offset):
        if entry.extent.offset < last:
            raise InputError(f"{path} is refused: its entry {abbreviated(entry.name)} overlaps another")
        last = entry.extent.offset + entry.extent.nbytes
    if last > end:
        raise InputError(f"{path} is a damaged zip: its entries reach beyond their directory")
    total = sum(entry.nbytes for entry in entries)
    if total > max(MAX_UNFOLDED_BYTES, BOMB_RATIO * sum(entry.extent.nbytes for entry in entries)):
        raise InputError(f"{path} is refused: it would expand to {total} bytes, as in a zip bomb")
