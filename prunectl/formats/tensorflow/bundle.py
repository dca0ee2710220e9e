"""A TensorFlow tensor bundle: an index of named tensors, and the data shards that hold their bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import google_crc32c
import ml_dtypes
import numpy as np

from prunectl.errors import InputError, abbreviated
from prunectl.formats import budgets
from prunectl.formats.base import format_shape
from prunectl.formats.extents import Extent, check_inside
from prunectl.formats.protobuf import BYTES, Field, WireError, fields, signed
from prunectl.formats.tensorflow.leveldb import Block, IndexRecord, mask, read_file, records

STRING, RESOURCE, VARIANT = 7, 20, 21
NOT_NUMBERS = frozenset({STRING, RESOURCE, VARIANT})

DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.float32),
    2: np.dtype(np.float64),
    3: np.dtype(np.int32),
    4: np.dtype(np.uint8),
    5: np.dtype(np.int16),
    6: np.dtype(np.int8),
    8: np.dtype(np.complex64),
    9: np.dtype(np.int64),
    10: np.dtype(np.bool_),
    11: np.dtype(np.int8),
    12: np.dtype(np.uint8),
    13: np.dtype(np.int32),
    14: np.dtype(ml_dtypes.bfloat16),
    15: np.dtype(np.int16),
    16: np.dtype(np.uint16),
    17: np.dtype(np.uint16),
    18: np.dtype(np.complex128),
    19: np.dtype(np.float16),
    22: np.dtype(np.uint32),
    23: np.dtype(np.uint64),
    24: np.dtype(ml_dtypes.float8_e5m2),
    25: np.dtype(ml_dtypes.float8_e4m3fn),
    26: np.dtype(ml_dtypes.float8_e4m3fnuz),
    27: np.dtype(ml_dtypes.float8_e4m3b11fnuz),
    28: np.dtype(ml_dtypes.float8_e5m2fnuz),
    29: np.dtype(ml_dtypes.int4),
    30: np.dtype(ml_dtypes.uint4),
}
"""NumPy dtypes by number in TensorFlow's `DataType`; the quantised types 11 to 13, 15 and 16 are stored as integers."""


def read_shape(data: memoryview, field: Field) -> tuple[int, ...]:
    """Parse a TensorShapeProto; a shape that no array can have is refused."""
    shape: list[int] = []
    for dimension in fields(data, field.begin, field.end):
        if dimension.number == 2 and dimension.wire == BYTES:
            sizes = [signed(size.value) for size in fields(data, dimension.begin, dimension.end) if size.number == 1]
            shape.append(sizes[-1] if sizes else 0)
        if len(shape) > budgets.MAX_TENSORFLOW_AXES:
            raise WireError(f"a shape of more than {budgets.MAX_TENSORFLOW_AXES} dimensions")
    if any(size < 0 for size in shape):
        raise WireError("a shape with a negative size")
    if math.prod(max(size, 1) for size in shape) > budgets.MAX_COUNT // 16:
        raise WireError("a shape too large for any memory")
    return tuple(shape)


WHOLE = -1
"""Length of a slice that spans its axis."""

_ESCAPES = {0x00: b"\x00\xff", 0xFF: b"\xff\x00"}
_END_OF_TEXT = b"\x00\x01"


def slice_key(name: bytes, bounds: tuple[tuple[int, int], ...]) -> bytes:
    """The index key of a slice of the tensor ``name`` with these starts and lengths (in OrderedCode)."""
    text = b"".join(_ESCAPES.get(byte, bytes((byte,))) for byte in name) + _END_OF_TEXT
    rank = len(bounds).to_bytes(1 if bounds else 0, "big")
    numbers = b"".join(_signed(start) + _signed(length) for start, length in bounds)
    return b"\x00" + text + bytes([len(rank)]) + rank + numbers


def _signed(value: int) -> bytes:
    length = (value if value >= 0 else ~value).bit_length() // 7 + 1
    # As many leading ones as there are bytes, XORed into the sign bits: longer numbers sort after shorter ones.
    header = ((1 << length) - 1) << (8 * length - length)
    return ((value ^ header) & ((1 << 8 * length) - 1)).to_bytes(length, "big")


@dataclass(frozen=True, slots=True)
class BundleEntry:
    """The index entry of one key."""

    key: bytes
    code: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    nbytes: int
    crc: int
    crc_at: int
    """Offset of the data's masked CRC-32C in the index file; -1 if it is missing or its block is compressed."""
    block: Block
    """The block of the index that holds this entry, and has a checksum of its own."""
    slices: tuple[tuple[tuple[int, int], ...], ...] = ()
    """Starts and lengths of the pieces that a partitioned tensor is stored in."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The NumPy dtype of the tensor."""
        return DTYPES[self.code]

    @property
    def name(self) -> str:
        """The key as text."""
        return self.key.decode("utf-8", "backslashreplace")


@dataclass(frozen=True, slots=True)
class Index:
    """A parsed index, not yet checked against the data shards."""

    path: Path
    shard_count: int
    is_big_endian: bool
    entries: dict[bytes, BundleEntry]


def read_index(path: Path) -> Index:
    """Read the index of a bundle."""
    data = read_file(path)
    index_records = records(path, data)
    try:
        header = next(index_records, None)
        if header is None or header.key != b"":
            raise InputError(f"{path} is damaged: it has no header")
        header_fields = {
            field.number: field.value for field in fields(header.data, header.begin, header.end) if field.wire != BYTES
        }
        count, is_big_endian = header_fields.get(1, 0), header_fields.get(2, 0) == 1
        return Index(path, count, is_big_endian, {record.key: _read_entry(record) for record in index_records})
    except WireError as error:
        raise InputError(f"{path} is damaged: its index holds {error}") from error


def _read_entry(record: IndexRecord) -> BundleEntry:
    code, shard, offset, nbytes, crc, crc_at = 0, 0, 0, 0, 0, -1
    shape: tuple[int, ...] = ()
    slices = []
    data = record.data
    for member in fields(data, record.begin, record.end):
        match member.number, member.wire:
            case 1, _:
                code = member.value
            case 2, 2:
                shape = read_shape(data, member)
            case 3, _:
                shard = member.value
            case 4, _:
                offset = signed(member.value)
            case 5, _:
                nbytes = signed(member.value)
            case 6, 5:
                crc, crc_at = member.value, -1 if record.block.is_packed else member.begin
            case 7, 2:
                slices.append(_read_slice(data, member))
    return BundleEntry(record.key, code, shape, shard, offset, nbytes, crc, crc_at, record.block, tuple(slices))


def _read_slice(data: memoryview, field: Field) -> tuple[tuple[int, int], ...]:
    bounds: list[tuple[int, int]] = []
    for extent in fields(data, field.begin, field.end):
        if len(bounds) == budgets.MAX_TENSORFLOW_AXES:
            raise WireError(f"a slice of more than {budgets.MAX_TENSORFLOW_AXES} dimensions")
        numbers = {number.number: signed(number.value) for number in fields(data, extent.begin, extent.end)}
        bounds.append((numbers.get(1, 0), numbers.get(2, WHOLE)))
    return tuple(bounds)


_PIECE = bytes(1 << 20)


@cache
def crc_of_zeros(nbytes: int) -> int:
    """The masked CRC-32C of `nbytes` zeros."""
    crc = 0
    for piece in zeros(nbytes):
        crc = google_crc32c.extend(crc, piece)
    return mask(crc)


def _shared_zeros(bundle: Bundle, file_bytes: int) -> dict[bytes, BundleEntry]:
    """Entries of zeros, by key, each with the longest entry of zeros at the same offset, whose bytes it shares."""
    entries = [entry for entry in bundle.entries.values() if entry.code in DTYPES and not entry.slices]
    shared: dict[bytes, BundleEntry] = {}
    leader: BundleEntry | None = None
    claimed = 0
    for entry in sorted(entries, key=lambda shared: (shared.shard, shared.offset, -shared.nbytes)):
        if leader is None or (entry.shard, entry.offset) != (leader.shard, leader.offset):
            leader = entry
            continue
        claimed += entry.nbytes
        if claimed > budgets.MAX_REPEATS * file_bytes + budgets.MAX_FREE_BYTES:
            raise InputError(
                f"{bundle.index} is refused: its tensors claim over {budgets.MAX_REPEATS} times the bytes of its data"
            )
        if 0 < entry.nbytes <= leader.nbytes <= file_bytes and _is_zeros(entry) and _is_zeros(leader):
            shared[entry.key] = leader
    return shared


def _is_zeros(entry: BundleEntry) -> bool:
    return entry.crc == crc_of_zeros(entry.nbytes)


def zeros(nbytes: int) -> Iterator[bytes]:
    """Yield `nbytes` zeros, piece by piece."""
    for begin in range(0, nbytes, len(_PIECE)):
        yield _PIECE[: nbytes - begin]


@dataclass(frozen=True, slots=True)
class Bundle:
    """An index whose entries were all checked to lie inside their shards."""

    index: Path
    is_big_endian: bool
    entries: Mapping[bytes, BundleEntry]
    shards: Mapping[int, Path]
    shared: Mapping[bytes, BundleEntry] = field(default_factory=dict)
    """Entries of zeros, each with the longest entry of zeros at the same offset, whose bytes it shares."""

    def numbers(self) -> tuple[BundleEntry, ...]:
        """The entries that are numeric tensors, without the slices of partitioned tensors."""
        return tuple(
            entry for key, entry in self.entries.items() if key[:1] != b"\x00" and entry.code not in NOT_NUMBERS
        )

    def extent(self, entry: BundleEntry) -> Extent:
        """The location of an entry's bytes."""
        return Extent(self.shards[entry.shard], entry.offset, entry.nbytes)

    def pieces(self, entry: BundleEntry) -> tuple[tuple[tuple[slice, ...], BundleEntry], ...]:
        """The slices of a partitioned tensor, each with its location in the whole tensor."""
        return tuple((_tensor_location(bounds), self.entries[slice_key(entry.key, bounds)]) for bounds in entry.slices)

    def text(self, key: bytes, limit: int) -> bytes:
        """The content of a scalar string; empty if there is none with this key."""
        entry = self.entries.get(key)
        if entry is None or entry.code != STRING or entry.shape or entry.slices:
            return b""
        if entry.nbytes > limit:
            raise InputError(f"{self.index} is refused: its {key.decode()} claims {entry.nbytes} bytes")
        with self.shards[entry.shard].open("rb") as file:
            file.seek(entry.offset)
            # The text is preceded by its length as a varint, and a checksum of that length.
            stored = file.read(entry.nbytes)
        prefix = next((index for index, byte in enumerate(stored[:10]) if byte < 0x80), 0) + 1 + 4
        return stored[prefix:]


def read_bundle(path: Path) -> Bundle:
    """Read the index of a bundle, and check it against the sizes of the shards."""
    index = read_index(path)
    unchecked = Bundle(path, index.is_big_endian, index.entries, _find_shards(index))
    sizes = {number: shard.stat().st_size for number, shard in unchecked.shards.items()}
    bundle = replace(unchecked, shared=_shared_zeros(unchecked, sum(sizes.values())))
    _check_extents(bundle, sizes)
    _check_slices(bundle)
    return bundle


def _find_shards(index: Index) -> dict[int, Path]:
    path, count = index.path, index.shard_count
    if count > budgets.MAX_TENSORS:
        raise InputError(f"{path} is refused: it claims {count} data shards")
    used = sorted({entry.shard for entry in index.entries.values()})
    if used and used[-1] >= count:
        raise InputError(f"{path} is damaged: it refers to data shard {used[-1]}, but has {count}")
    prefix = path.name.removesuffix(".index")
    shards = {number: path.with_name(f"{prefix}.data-{number:05d}-of-{count:05d}") for number in used}
    for shard in shards.values():
        if not shard.is_file():
            raise InputError(f"{path} is incomplete: its data shard {abbreviated(shard.name)} is missing")
    return shards


def _check_extents(bundle: Bundle, sizes: Mapping[int, int]) -> None:
    ends = dict.fromkeys(sizes, 0)
    for entry in sorted(bundle.entries.values(), key=lambda item: (item.shard, item.offset, item.key in bundle.shared)):
        name = entry.name
        if entry.code not in DTYPES and entry.code not in NOT_NUMBERS:
            raise InputError(
                f"{bundle.index} holds {abbreviated(name)} as type {entry.code}, which prunectl does not read"
            )
        if entry.slices:
            continue
        check_inside(bundle.shards[entry.shard], entry.offset, entry.nbytes, sizes[entry.shard], name)
        if entry.code in DTYPES and entry.nbytes != math.prod(entry.shape) * entry.dtype.itemsize:
            raise InputError(
                f"{bundle.index} is damaged: {abbreviated(name)} of shape {format_shape(entry.shape)} "
                f"does not match its {entry.nbytes} bytes"
            )
        if entry.nbytes and entry.offset < ends[entry.shard] and entry.key not in bundle.shared:
            raise InputError(f"{bundle.index} is damaged: {abbreviated(name)} overlaps another tensor")
        ends[entry.shard] = max(ends[entry.shard], entry.offset + entry.nbytes)


def _check_slices(bundle: Bundle) -> None:
    for entry in bundle.entries.values():
        name = entry.name
        for bounds in entry.slices:
            piece = bundle.entries.get(slice_key(entry.key, bounds))
            if piece is None or piece.code != entry.code or piece.slices:
                raise InputError(f"{bundle.index} is incomplete: a slice of {abbreviated(name)} is missing")
            if len(bounds) != len(entry.shape) or piece.shape != _sizes(entry.shape, bounds):
                raise InputError(f"{bundle.index} is damaged: a slice of {abbreviated(name)} does not fit into it")
        if entry.slices and sum(math.prod(_sizes(entry.shape, bounds)) for bounds in entry.slices) != math.prod(
            entry.shape
        ):
            raise InputError(
                f"{bundle.index} is incomplete: the slices of {abbreviated(name)} do not cover the whole tensor"
            )


def _sizes(shape: tuple[int, ...], bounds: tuple[tuple[int, int], ...]) -> tuple[int, ...]:
    """The shape of a slice, with -1 for an axis whose size it exceeds."""
    return tuple(
        size if length == WHOLE else length if 0 <= start <= start + length <= size else -1
        for size, (start, length) in zip(shape, bounds, strict=True)
    )


def _tensor_location(bounds: tuple[tuple[int, int], ...]) -> tuple[slice, ...]:
    return tuple(slice(None) if length == WHOLE else slice(start, start + length) for start, length in bounds)
