"""The index of a TensorFlow tensor bundle: what it says of each tensor, and where it says so."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.errors import InputError
from prunectl.formats.protobuf import BYTES, Field, WireError, fields, signed
from prunectl.formats.tensorflow.dtypes import DTYPES, MAX_RANK, read_shape
from prunectl.formats.tensorflow.leveldb_table import Block, Record, read_file, records
from prunectl.formats.tensorflow.slice_keys import WHOLE


@dataclass(frozen=True, slots=True)
class Entry:
    """What the index says of one key."""

    key: bytes
    code: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    nbytes: int
    crc: int
    crc_at: int
    """Where in the index file the masked CRC-32C of the data stands; -1 if it is missing or packed in its block."""
    block: Block
    """The block of the index that holds this entry, with a checksum of its own."""
    slices: tuple[tuple[tuple[int, int], ...], ...] = ()
    """Starts and lengths of the pieces that a partitioned tensor is stored in."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of its numbers."""
        return DTYPES[self.code]


@dataclass(frozen=True, slots=True)
class Index:
    """All that an index says, not yet held against the data."""

    path: Path
    shard_count: int
    is_big_endian: bool
    entries: dict[bytes, Entry]


def read_index(path: Path) -> Index:
    """Read the index of a bundle."""
    data = read_file(path)
    found = records(path, data)
    try:
        header = next(found, None)
        if header is None or header.key != b"":
            raise InputError(f"{path} is damaged: it has no header")
        count, is_big_endian = _read_header(header)
        return Index(path, count, is_big_endian, {record.key: _read_entry(record) for record in found})
    except WireError as error:
        raise InputError(f"{path} is damaged: its index holds {error}") from error


def _read_header(record: Record) -> tuple[int, bool]:
    facts = {
        field.number: field.value for field in fields(record.data, record.begin, record.end) if field.wire != BYTES
    }
    return facts.get(1, 0), facts.get(2, 0) == 1


def _read_entry(record: Record) -> Entry:
    code, shard, offset, nbytes, crc, crc_at = 0, 0, 0, 0, 0, -1
    shape: tuple[int, ...] = ()
    slices = []
    data = record.data
    for field in fields(data, record.begin, record.end):
        match field.number, field.wire:
            case 1, _:
                code = field.value
            case 2, 2:
                shape = read_shape(data, field)
            case 3, _:
                shard = field.value
            case 4, _:
                offset = signed(field.value)
            case 5, _:
                nbytes = signed(field.value)
            case 6, 5:
                crc, crc_at = field.value, -1 if record.block.is_packed else field.begin
            case 7, 2:
                slices.append(_read_slice(data, field))
    return Entry(record.key, code, shape, shard, offset, nbytes, crc, crc_at, record.block, tuple(slices))


def _read_slice(data: memoryview, field: Field) -> tuple[tuple[int, int], ...]:
    bounds: list[tuple[int, int]] = []
    for extent in fields(data, field.begin, field.end):
        if len(bounds) == MAX_RANK:
            raise WireError(f"a slice of more than {MAX_RANK} dimensions")
        facts = {found.number: signed(found.value) for found in fields(data, extent.begin, extent.end)}
        bounds.append((facts.get(1, 0), facts.get(2, WHOLE)))
    return tuple(bounds)
