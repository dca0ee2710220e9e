"""A LevelDB table: sorted records in checksummed blocks, and where in the file each of them lies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import google_crc32c

from prunectl.errors import InputError
from prunectl.formats.protobuf import WireError, varint
from prunectl.formats.tensorflow import snappy

MAGIC = bytes.fromhex("57fb808b247547db")
FOOTER_BYTES = 48
TRAILER_BYTES = 5
"""Behind each block: a byte that says how it is compressed, then a masked CRC-32C over the block and that byte."""
MAX_TABLE_BYTES = 3 << 20
MAX_PACKED_BYTES = 4 << 20
"""All compressed blocks together, and also what one of them may unpack to."""
MAX_RECORDS = 100_000
"""Beyond any model, and little enough to refuse within a second or two."""
MAX_KEY_BYTES = 16 << 20
"""All keys together: each repeats a part of the one before, so a few bytes in the file can claim many."""
_BROKEN = 8
"""How much longer it takes to decode a key that may not be text."""
_PLAIN, _PACKED = 0, 1
_MASK_DELTA = 0xA282EAD8


@dataclass(frozen=True, slots=True)
class Block:
    """A block of records; its trailer follows at ``end``."""

    begin: int
    end: int
    is_packed: bool = False
    """Whether it is compressed: then no byte of its records can be changed in place."""

    @property
    def crc_at(self) -> int:
        """Where the masked CRC-32C of the block stands."""
        return self.end + 1


@dataclass(frozen=True, slots=True)
class Record:
    """One record, and where its value lies."""

    key: bytes
    data: memoryview
    """The file, or what its block unpacks to."""
    begin: int
    end: int
    block: Block


def masked_crc(data: bytes) -> int:
    """Return the CRC-32C of some bytes as LevelDB stores it: ((crc >> 15) | (crc << 17)) + a constant."""
    return mask(google_crc32c.value(data))


def mask(crc: int) -> int:
    """Return a CRC-32C as LevelDB stores it, so that a checksum of checksums is no special case."""
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF


def read_file(path: Path) -> memoryview:
    """Return the bytes of a table, which is small beside what it is an index of."""
    try:
        file_bytes = path.stat().st_size
        if file_bytes > MAX_TABLE_BYTES:
            raise InputError(f"{path} is refused: an index of {file_bytes} bytes is more than any model needs")
        return memoryview(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def records(path: Path, data: memoryview) -> Iterator[Record]:
    """Yield the records of a table in their order, each block checked against its checksum."""
    if len(data) < FOOTER_BYTES or data[-len(MAGIC) :] != MAGIC:
        raise InputError(f"{path} is truncated or damaged: it does not end like the index of a checkpoint")
    try:
        yield from _checked(path, data)
    except WireError as error:
        raise InputError(f"{path} is damaged: its index holds {error}") from error


def _checked(path: Path, data: memoryview) -> Iterator[Record]:
    footer = len(data) - FOOTER_BYTES
    _, at = _handle(data, footer, len(data))
    index, _ = _handle(data, at, len(data))
    last, reached, count, key_bytes, packed_bytes = b"", 0, 0, 0, 0
    for pointer in _records_of(path, data, index, footer):
        block, _ = _handle(pointer.data, pointer.begin, pointer.end)
        if block.begin < reached:
            raise InputError(f"{path} is damaged: the blocks of its index overlap")
        reached = block.end
        packed_bytes += block.end - block.begin
        for record in _records_of(path, data, block, footer):
            if count and record.key <= last:
                raise InputError(f"{path} is damaged: the keys of its index are out of order")
            if record.block.is_packed and packed_bytes > MAX_PACKED_BYTES:
                raise InputError(f"{path} is refused: its compressed index is too long")
            last, count = record.key, count + 1
            key_bytes += len(record.key) * (1 if record.key.isascii() else _BROKEN)
            if count > MAX_RECORDS or key_bytes > MAX_KEY_BYTES:
                raise InputError(f"{path} is refused: it claims more than {count - 1} tensors")
            yield record


def _handle(data: memoryview, at: int, end: int) -> tuple[Block, int]:
    begin, at = varint(data, at, end)
    length, at = varint(data, at, end)
    return Block(begin, begin + length), at


def _records_of(path: Path, data: memoryview, block: Block, limit: int) -> Iterator[Record]:
    _check_block(path, data, block, limit)
    if data[block.end] == _PACKED:
        unpacked = memoryview(snappy.unpack(data[block.begin : block.end], MAX_PACKED_BYTES))
        yield from _split(path, unpacked, 0, len(unpacked), replace(block, is_packed=True))
    else:
        yield from _split(path, data, block.begin, block.end, block)


def _check_block(path: Path, data: memoryview, block: Block, limit: int) -> None:
    if block.end + TRAILER_BYTES > limit:
        raise InputError(f"{path} is truncated or damaged: a block of its index lies outside of it")
    stored = int.from_bytes(data[block.crc_at : block.crc_at + 4], "little")
    if stored != masked_crc(bytes(data[block.begin : block.crc_at])):
        raise InputError(f"{path} is damaged: a block of its index is not what its checksum says")
    if data[block.end] not in {_PLAIN, _PACKED}:
        raise InputError(f"{path} compresses its index in a way that prunectl does not read")
    if data[block.end] == _PACKED and block.end - block.begin > MAX_PACKED_BYTES:
        raise InputError(f"{path} is refused: a block of its index is too long")


def _split(path: Path, data: memoryview, at: int, end: int, block: Block) -> Iterator[Record]:
    restarts = int.from_bytes(data[end - 4 : end], "little") if end - at >= 4 else 0
    begin, end, key = at, end - 4 - 4 * restarts, b""
    if end < begin:
        raise InputError(f"{path} is damaged: a block of its index has no room for its restart points")
    while at < end:
        shared, at = varint(data, at, end)
        added, at = varint(data, at, end)
        length, at = varint(data, at, end)
        value = at + added
        if shared > len(key) or value + length > end or shared + added > MAX_KEY_BYTES:
            raise InputError(f"{path} is damaged: a record of its index reaches past its block")
        key = key[:shared] + bytes(data[at:value])
        at = value + length
        yield Record(key, data, value, at, block)
