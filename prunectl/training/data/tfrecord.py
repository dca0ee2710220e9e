"""Records in TFRecord files: a length, its checksum, the bytes, their checksum."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from prunectl.errors import InputError
from prunectl.formats.tensorflow.leveldb_table import masked_crc

_HEAD_BYTES = 12
_CRC_BYTES = 4
_GZIP = b"\x1f\x8b"
MAX_RECORD_BYTES = 1 << 30


def records(path: Path) -> Iterator[bytes]:
    """Yield the records of a file, each checked; it may be compressed with gzip."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    # A record can be as long as the magic number of gzip reads; but then its checksum fits too.
    is_packed = head.startswith(_GZIP) and not _is_head(head)
    number = 0
    try:
        with gzip.open(path) if is_packed else path.open("rb") as file:
            while (record := _next(file, path, number)) is not None:
                yield record
                number += 1
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path} is damaged: it cannot be inflated behind record {number}") from error


def _is_head(head: bytes) -> bool:
    return len(head) == _HEAD_BYTES and masked_crc(head[:8]) == int.from_bytes(head[8:], "little")


def _next(file: IO[bytes] | gzip.GzipFile, path: Path, number: int) -> bytes | None:
    head = file.read(_HEAD_BYTES)
    if not head:
        return None
    if not _is_head(head):
        told = "is no TFRecord file" if number == 0 else "is truncated or damaged"
        raise InputError(f"{path} {told}: the length of record {number} has a wrong checksum")
    length = int.from_bytes(head[:8], "little")
    if length > MAX_RECORD_BYTES:
        raise InputError(f"{path} is refused: record {number} claims {length} bytes")
    body = file.read(length + _CRC_BYTES)
    if len(body) < length + _CRC_BYTES:
        raise InputError(f"{path} is truncated: it ends within record {number}")
    record = body[:length]
    if masked_crc(record) != int.from_bytes(body[length:], "little"):
        raise InputError(f"{path} is damaged: record {number} has a wrong checksum")
    return record
