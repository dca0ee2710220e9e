"""Protobuf's wire format, written: the few kinds of fields that we add to files."""

from __future__ import annotations

from prunectl.formats.protobuf import BYTES, VARINT


def varint(value: int) -> bytes:
    """Return a number that is not negative, seven bits to a byte, the lowest first."""
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    digits.append(value)
    return bytes(digits)


def number(field: int, value: int) -> bytes:
    """Return a field that is a number."""
    return varint(field << 3 | VARINT) + varint(value)


def head(field: int, nbytes: int) -> bytes:
    """Return what stands before the bytes of a field."""
    return varint(field << 3 | BYTES) + varint(nbytes)
