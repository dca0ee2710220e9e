"""Protobuf's wire format: the fields of messages and their offsets, read without a schema and without copies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prunectl.formats import budgets

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_FIXED_BYTES = {FIXED64: 8, FIXED32: 4}
_MAX_SHIFT = 63
MAX_VARINT_BYTES = 10
_SIGN_BIT = 1 << 63
_ALL_BITS = (1 << 64) - 1


class WireError(ValueError):
    """The bytes are not a protobuf message."""


class Field(NamedTuple):
    """One field of a message."""

    number: int
    wire: int
    value: int
    """The value of a varint or fixed-width field; the length of a field of bytes."""
    begin: int
    """Offset of the payload in the buffer."""
    end: int
    """Offset behind the payload."""


def fields(data: memoryview, begin: int = 0, end: int | None = None) -> Iterator[Field]:
    """Yield the fields of the message at ``begin``..``end`` of a buffer."""
    offset, stop = begin, len(data) if end is None else end
    while offset < stop:
        # Most varints have one byte, and are decoded inline: a call for each would double the time.
        tag = data[offset]
        if tag < 0x80:
            offset += 1
        else:
            tag, offset = read_varint(data, offset, stop)
        number, wire = tag >> 3, tag & 7
        if number == 0:
            raise WireError("field 0")
        value, payload = 0, offset
        if wire in (BYTES, VARINT):
            if offset < stop and data[offset] < 0x80:
                value = data[offset]
                offset += 1
            else:
                value, offset = read_varint(data, offset, stop)
            if wire == BYTES:
                payload = offset
                offset += value
        elif wire in _FIXED_BYTES:
            offset += _FIXED_BYTES[wire]
            value = int.from_bytes(data[payload:offset], "little")
        else:
            raise WireError(f"wire type {wire}")
        if offset > stop:
            raise WireError("a field reaches past the end of its message")
        yield Field(number, wire, value, payload, offset)


def raw_fields(data: memoryview, begin: int, end: int) -> Iterator[tuple[bytes, Field]]:
    """Yield the fields of a message, each with its encoded bytes: tag, length and payload."""
    start = begin
    for field in fields(data, begin, end):
        yield bytes(data[start : field.end]), field
        start = field.end


def read_varint(data: memoryview, offset: int, end: int) -> tuple[int, int]:
    """The varint at ``offset``, and the offset behind it."""
    value = shift = 0
    while offset < end and shift <= _MAX_SHIFT:
        byte = data[offset]
        offset += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & _ALL_BITS, offset
        shift += 7
    raise WireError("a number without an end")


def signed(value: int) -> int:
    """The signed value of the varint of an int32 or int64 field, which is in two's complement."""
    return value - (_SIGN_BIT << 1) if value >= _SIGN_BIT else value


def packed(data: memoryview, field: Field) -> list[int]:
    """The varints of a repeated field, whether packed or a single one."""
    if field.wire == VARINT:
        return [field.value]
    numbers, offset = [], field.begin
    while offset < field.end:
        number, offset = read_varint(data, offset, field.end)
        numbers.append(number)
    return numbers


def text(data: memoryview, field: Field) -> str:
    """The string in a field."""
    raw = bytes(data[field.begin : field.end])
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        # Each byte that is not UTF-8 becomes four characters, which is slow.
        if len(raw) > budgets.MAX_BROKEN_TEXT_BYTES:
            raise WireError(f"a name of {len(raw)} bytes that is not text") from error
        return raw.decode("utf-8", "backslashreplace")


def varints(raw: bytes) -> NDArray[np.uint64]:
    """All varints of a packed field, decoded with NumPy."""
    data = np.frombuffer(raw, np.uint8)
    if data.size and data[-1] >= 0x80:
        raise WireError("a number without an end")
    ends = np.flatnonzero(data < 0x80)
    begins = np.concatenate((np.zeros(min(1, ends.size), ends.dtype), ends[:-1] + 1))
    lengths = ends - begins + 1
    if ends.size and lengths.max() > MAX_VARINT_BYTES:
        raise WireError("a number without an end")
    numbers = np.zeros(ends.size, np.uint64)
    for index in range(int(lengths.max(initial=0))):
        is_longer = lengths > index
        bits = (data[begins[is_longer] + index] & 0x7F).astype(np.uint64)
        numbers[is_longer] |= bits << np.uint64(7 * index)
    return numbers


def encode_varint(value: int) -> bytes:
    """The varint of a number that is not negative: seven bits to a byte, the lowest first."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def number(field: int, value: int) -> bytes:
    """An encoded varint field."""
    return encode_varint(field << 3 | VARINT) + encode_varint(value)


def length_prefix(field: int, nbytes: int) -> bytes:
    """The tag and length before the payload of a field of bytes."""
    return encode_varint(field << 3 | BYTES) + encode_varint(nbytes)


class BudgetedReader:
    """Reads the fields of a file, up to a maximal number of fields."""

    def __init__(self, data: memoryview, most: int = budgets.MAX_PROTOBUF_FIELDS) -> None:
        self.data = data
        self._most = self._left = most

    def spend(self, count: int) -> None:
        """Count fields that were read in another way."""
        self._left -= count
        if self._left < 0:
            raise WireError(f"more than {self._most} fields")

    def fields(self, inside: Field | None = None) -> Iterator[Field]:
        """Yield the fields of a message, or of the whole file."""
        begin, end = (0, None) if inside is None else (inside.begin, inside.end)
        # Opening a message takes as long as reading a field, even if the message is empty.
        self.spend(1)
        for field in fields(self.data, begin, end):
            self.spend(1)
            yield field

    def messages(self, inside: Field | None, number: int) -> Iterator[Field]:
        """Yield the fields with a field number whose wire type is that of messages, strings and bytes."""
        for field in self.fields(inside):
            if field.number == number and field.wire == BYTES:
                yield field
