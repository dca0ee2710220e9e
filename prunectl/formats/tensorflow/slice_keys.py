"""Keys under which a checkpoint keeps the slices of a partitioned tensor, in TensorFlow's ordered code."""

from __future__ import annotations

WHOLE = -1
"""Length of a slice that spans its axis."""

_ESCAPES = {0x00: b"\x00\xff", 0xFF: b"\xff\x00"}
_END_OF_TEXT = b"\x00\x01"


def slice_key(name: bytes, bounds: tuple[tuple[int, int], ...]) -> bytes:
    """Return the key of the slice of ``name`` that has these starts and lengths."""
    text = b"".join(_ESCAPES.get(byte, bytes((byte,))) for byte in name) + _END_OF_TEXT
    rank = len(bounds).to_bytes(1 if bounds else 0, "big")
    numbers = b"".join(_signed(start) + _signed(length) for start, length in bounds)
    return b"\x00" + text + bytes([len(rank)]) + rank + numbers


def _signed(value: int) -> bytes:
    length = (value if value >= 0 else ~value).bit_length() // 7 + 1
    # As many leading ones as there are bytes, flipped into the sign bits: longer numbers sort behind shorter ones.
    header = ((1 << length) - 1) << (8 * length - length)
    return ((value ^ header) & ((1 << 8 * length) - 1)).to_bytes(length, "big")
