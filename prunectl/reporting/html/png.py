"""A small picture as a PNG that a page holds in itself: sixteen colours, no library."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

LEVELS = 16
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_BITS, _PALETTE = 4, 3
Color = tuple[int, int, int]


def data_uri(levels: NDArray[np.uint8], colors: Sequence[Color]) -> str:
    """Return a picture of levels from 0 to 15, each in its colour."""
    return f"data:image/png;base64,{base64.b64encode(png(levels, colors)).decode()}"


def png(levels: NDArray[np.uint8], colors: Sequence[Color]) -> bytes:
    """Return the bytes of the file."""
    tall, wide = levels.shape
    even = np.pad(levels, ((0, 0), (0, wide % 2)))
    # Two pixels in a byte, the left one high; each line begins with the number of its filter, which is none.
    lines = np.pad(even[:, ::2] << _BITS | even[:, 1::2], ((0, 0), (1, 0)))
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", wide, tall, _BITS, _PALETTE, 0, 0, 0)),
        (b"PLTE", bytes(part for color in colors for part in color)),
        (b"IDAT", zlib.compress(lines.astype(np.uint8).tobytes(), 9)),
        (b"IEND", b""),
    )
    return _SIGNATURE + b"".join(_chunk(name, data) for name, data in parts)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
