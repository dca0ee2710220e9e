"""Snappy, unpacked: the compression of some LevelDB blocks."""

from __future__ import annotations

from prunectl.formats.protobuf import WireError, varint

_LITERAL, _NEAR = 0, 1
_LONG_LITERALS = 60
"""From here on, the length stands in the bytes that follow."""


def unpack(packed: memoryview, limit: int) -> bytes:
    """Return what was packed, refusing more than ``limit`` bytes."""
    claimed, at = varint(packed, 0, len(packed))
    if claimed > limit:
        raise WireError(f"a block that claims to unpack to {claimed} bytes")
    out = bytearray()
    while at < len(packed):
        tag = packed[at]
        at += 1
        if tag & 3 == _LITERAL:
            length, at = _literal_length(packed, tag >> 2, at)
            out += packed[at : at + length]
            at += length
        else:
            length, back, at = _copy(packed, tag, at)
            if not 0 < back <= len(out):
                raise WireError("a packed block that copies from before its start")
            # A copy may run into what it writes: then the last bytes repeat.
            piece = bytes(out[-back:][:length])
            out += (piece * (length // len(piece) + 1))[:length]
        if len(out) > claimed or at > len(packed):
            raise WireError("a packed block longer than it claims")
    if len(out) != claimed:
        raise WireError("a packed block shorter than it claims")
    return bytes(out)


def _literal_length(packed: memoryview, short: int, at: int) -> tuple[int, int]:
    if short < _LONG_LITERALS:
        return short + 1, at
    end = at + short - _LONG_LITERALS + 1
    return int.from_bytes(packed[at:end], "little") + 1, end


def _copy(packed: memoryview, tag: int, at: int) -> tuple[int, int, int]:
    if tag & 3 == _NEAR:
        end = at + 1
        return 4 + (tag >> 2 & 7), (tag >> 5) << 8 | int.from_bytes(packed[at:end], "little"), end
    end = at + (2 if tag & 3 == 2 else 4)
    return 1 + (tag >> 2), int.from_bytes(packed[at:end], "little"), end
