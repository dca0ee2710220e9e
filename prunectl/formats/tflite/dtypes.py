"""TensorFlow Lite's types of numbers, and those that share a byte."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

STRING, RESOURCE, VARIANT = 5, 13, 14
NOT_NUMBERS = frozenset({STRING, RESOURCE, VARIANT})

DTYPES: dict[int, np.dtype[Any]] = {
    0: np.dtype(np.float32),
    1: np.dtype(np.float16),
    2: np.dtype(np.int32),
    3: np.dtype(np.uint8),
    4: np.dtype(np.int64),
    6: np.dtype(np.bool_),
    7: np.dtype(np.int16),
    8: np.dtype(np.complex64),
    9: np.dtype(np.int8),
    10: np.dtype(np.float64),
    11: np.dtype(np.complex128),
    12: np.dtype(np.uint64),
    15: np.dtype(np.uint32),
    16: np.dtype(np.uint16),
    17: np.dtype(ml_dtypes.int4),
    18: np.dtype(ml_dtypes.bfloat16),
    19: np.dtype(ml_dtypes.int2),
    20: np.dtype(ml_dtypes.uint4),
}
"""By number in `TensorType`."""

BITS = {17: 4, 19: 2, 20: 4}
"""Of the types that share a byte."""


def stored_bytes(code: int, size: int) -> int:
    """Return the bytes that a number of elements take in the file."""
    return (size * BITS[code] + 7) // 8 if code in BITS else size * DTYPES[code].itemsize


def unpack(raw: NDArray[np.uint8], code: int, size: int) -> NDArray[Any]:
    """Return the elements as one each, the lowest bits of a byte first."""
    if code not in BITS:
        return raw.view(DTYPES[code])[:size]
    bits = BITS[code]
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    parts = ((raw[:, None] >> shifts) & np.uint8((1 << bits) - 1)).reshape(-1)[:size]
    if code == 20:
        return parts.astype(DTYPES[code])
    signed = parts.astype(np.int8)
    return np.where(signed >= 1 << (bits - 1), signed - (1 << bits), signed).astype(DTYPES[code])
