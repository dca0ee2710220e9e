"""LevelDB tables (SSTables): sorted records in checksummed blocks, which may be compressed with Snappy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import google_crc32c

from prunectl.errors import InputError, reading
from prunectl.formats import budgets
from prunectl.formats.detect import TABLE_MAGIC
from prunectl.formats.protobuf import WireError, encode_varint, read_varint

_LITERAL, _NEAR = 0, 1
_LONG_LITERAL = 60
"""From this value on, the length of a literal is in the bytes that follow."""


def snappy_decompress(packed: memoryview, limit: int) -> bytes:
    """Decompress a Snappy block, refusing more than ``limit`` bytes."""
    size, offset = read_varint(packed, 0, len(packed))
    if size > limit:
        raise WireError(f"a block that claims to unpack to {size} bytes")
    out = bytearray()
    while offset < len(packed):
        tag = packed[offset]
        offset += 1
        if tag & 3 == _LITERAL:
            length, offset = _literal_length(packed, tag >> 2, offset)
            out += packed[offset : offset + length]
            offset += length
        else:
            length, back, offset = _copy(packed, tag, offset)
            if not 0 < back <= len(out):
                raise WireError("a packed block that copies from before its start")
            # A copy may overlap its own output: then the last bytes repeat.
            repeated = bytes(out[-back:][:length])
            out += (repeated * (length // len(repeated) + 1))[:length]
        if len(out) > size or offset > len(packed):
            raise WireError("a packed block longer than it claims")
    if len(out) != size:
        raise WireError("a packed block shorter than it claims")
    return bytes(out)


def _literal_length(packed: memoryview, short: int, offset: int) -> tuple[int, int]:
    if short < _LONG_LITERAL:
        return short + 1, offset
    end = offset + short - _LONG_LITERAL + 1
    return int.from_bytes(packed[offset:end], "little") + 1, end


def _copy(packed: memoryview, tag: int, offset: int) -> tuple[int, int, int]:
    if tag & 3 == _NEAR:
        end = offset + 1
        return 4 + (tag >> 2 & 7), (tag >> 5) << 8 | int.from_bytes(packed[offset:end], "little"), end
    end = offset + (2 if tag & 3 == 2 else 4)
    return 1 + (tag >> 2), int.from_bytes(packed[offset:end], "little"), end


FOOTER_BYTES = 48
TRAILER_BYTES = 5
"""Trailer of each block: a byte for its compression, then a masked CRC-32C over the block and that byte."""
_NON_ASCII_COST = 8
"""Factor by which decoding takes longer for a key that is not ASCII."""
_PLAIN_BLOCK, _PACKED = 0, 1
_MASK_DELTA = 0xA282EAD8


@dataclass(frozen=True, slots=True)
class Block:
    """A block of records; its trailer follows at ``end``."""

    begin: int
    end: int
    is_packed: bool = False
    """Whether the block is compressed, so that its records cannot be patched in place."""

    @property
    def crc_at(self) -> int:
        """Offset of the masked CRC-32C of the block."""
        return self.end + 1


@dataclass(frozen=True, slots=True)
class IndexRecord:
    """A record, and the range of its value in `data`."""

    key: bytes
    data: memoryview
    """The file, or the decompressed block."""
    begin: int
    end: int
    block: Block


def masked_crc(data: bytes) -> int:
    """The CRC-32C of some bytes as LevelDB stores it: ((crc >> 15) | (crc << 17)) + a constant."""
    return mask(google_crc32c.value(data))


def mask(crc: int) -> int:
    """A CRC-32C as LevelDB stores it: masked, because the CRC of data that contains CRCs is weak."""
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF


def read_file(path: Path) -> memoryview:
    """The bytes of a table, which is small compared with the data that it indexes."""
    with reading(path):
        file_bytes = path.stat().st_size
        if file_bytes > budgets.MAX_TABLE_BYTES:
            raise InputError(f"{path} is refused: its index of {file_bytes} bytes is larger than prunectl allows")
        return memoryview(path.read_bytes())


def records(path: Path, data: memoryview) -> Iterator[IndexRecord]:
    """Yield the records of a table in order, each block checked against its checksum."""
    if len(data) < FOOTER_BYTES or data[-len(TABLE_MAGIC) :] != TABLE_MAGIC:
        raise InputError(f"{path} is truncated or damaged: it does not end like the index of a checkpoint")
    try:
        yield from _checked_records(path, data)
    except WireError as error:
        raise InputError(f"{path} is damaged: its index holds {error}") from error


def _checked_records(path: Path, data: memoryview) -> Iterator[IndexRecord]:
    footer = len(data) - FOOTER_BYTES
    _, offset = _handle(data, footer, len(data))
    index, _ = _handle(data, offset, len(data))
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
            if record.block.is_packed and packed_bytes > budgets.MAX_SNAPPY_BYTES:
                raise InputError(f"{path} is refused: its compressed index is too long")
            last, count = record.key, count + 1
            key_bytes += len(record.key) * (1 if record.key.isascii() else _NON_ASCII_COST)
            if count > budgets.MAX_TENSORS or key_bytes > budgets.MAX_NAMES_BYTES:
                raise InputError(f"{path} is refused: it claims more than {count - 1} tensors")
            yield record


def _handle(data: memoryview, offset: int, end: int) -> tuple[Block, int]:
    begin, offset = read_varint(data, offset, end)
    length, offset = read_varint(data, offset, end)
    return Block(begin, begin + length), offset


def _records_of(path: Path, data: memoryview, block: Block, limit: int) -> Iterator[IndexRecord]:
    _check_block(path, data, block, limit)
    if data[block.end] == _PACKED:
        unpacked = memoryview(snappy_decompress(data[block.begin : block.end], budgets.MAX_SNAPPY_BYTES))
        yield from _block_records(path, unpacked, 0, len(unpacked), replace(block, is_packed=True))
    else:
        yield from _block_records(path, data, block.begin, block.end, block)


def _check_block(path: Path, data: memoryview, block: Block, limit: int) -> None:
    if block.end + TRAILER_BYTES > limit:
        raise InputError(f"{path} is truncated or damaged: a block of its index lies outside of it")
    stored = int.from_bytes(data[block.crc_at : block.crc_at + 4], "little")
    if stored != masked_crc(bytes(data[block.begin : block.crc_at])):
        raise InputError(f"{path} is damaged: a block of its index does not match its checksum")
    if data[block.end] not in {_PLAIN_BLOCK, _PACKED}:
        raise InputError(f"{path} compresses its index in a way that prunectl does not read")
    if data[block.end] == _PACKED and block.end - block.begin > budgets.MAX_SNAPPY_BYTES:
        raise InputError(f"{path} is refused: a block of its index is too long")


def _block_records(path: Path, data: memoryview, offset: int, end: int, block: Block) -> Iterator[IndexRecord]:
    restarts = int.from_bytes(data[end - 4 : end], "little") if end - offset >= 4 else 0
    begin, end, key = offset, end - 4 - 4 * restarts, b""
    if end < begin:
        raise InputError(f"{path} is damaged: a block of its index has no room for its restart points")
    while offset < end:
        shared, offset = read_varint(data, offset, end)
        added, offset = read_varint(data, offset, end)
        length, offset = read_varint(data, offset, end)
        value = offset + added
        if shared > len(key) or value + length > end or shared + added > budgets.MAX_NAMES_BYTES:
            raise InputError(f"{path} is damaged: a record of its index reaches past its block")
        key = key[:shared] + bytes(data[offset:value])
        offset = value + length
        yield IndexRecord(key, data, value, offset, block)


BLOCK_BYTES = 1 << 18
"""Block size of TensorFlow's own tables."""
RESTART_INTERVAL = 16
_PLAIN_TRAILER = b"\0"


def table(records: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Serialize keys and values as a table; the keys must be in ascending order."""
    out = bytearray()
    pointers: list[tuple[bytes, bytes]] = []
    pending: list[tuple[bytes, bytes]] = []
    pending_bytes = 0
    for key, value in records:
        pending.append((key, value))
        pending_bytes += len(key) + len(value)
        if pending_bytes >= BLOCK_BYTES:
            pointers.append((key, _append(out, _block(pending, RESTART_INTERVAL))))
            pending, pending_bytes = [], 0
    if pending:
        pointers.append((pending[-1][0], _append(out, _block(pending, RESTART_INTERVAL))))
    metaindex = _append(out, _block([], 1))
    index = _append(out, _block(pointers, 1))
    return bytes(out) + (metaindex + index).ljust(FOOTER_BYTES - len(TABLE_MAGIC), b"\0") + TABLE_MAGIC


def _append(out: bytearray, block: bytes) -> bytes:
    """Add a block and its trailer, and return its handle."""
    handle = encode_varint(len(out)) + encode_varint(len(block))
    out += block + _PLAIN_TRAILER + masked_crc(block + _PLAIN_TRAILER).to_bytes(4, "little")
    return handle


def _block(records: Iterable[tuple[bytes, bytes]], interval: int) -> bytes:
    """Serialize records: each key without the prefix it shares with the last one, except at every `interval`-th."""
    out, restarts, last = bytearray(), [0], b""
    for number, (key, value) in enumerate(records):
        shared = 0
        if number % interval:
            limit = min(len(last), len(key))
            shared = next((length for length in range(limit) if last[length] != key[length]), limit)
        elif number:
            restarts.append(len(out))
        out += (
            encode_varint(shared) + encode_varint(len(key) - shared) + encode_varint(len(value)) + key[shared:] + value
        )
        last = key
    return bytes(out) + b"".join(restart.to_bytes(4, "little") for restart in [*restarts, len(restarts)])
