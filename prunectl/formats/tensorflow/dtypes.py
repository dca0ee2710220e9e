"""TensorFlow's types of numbers and its shapes, as its protobufs write them."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np

from prunectl.formats.protobuf import BYTES, Field, WireError, fields, signed

STRING, RESOURCE, VARIANT = 7, 20, 21
NOT_NUMBERS = frozenset({STRING, RESOURCE, VARIANT})
MAX_RANK = 32
"""NumPy's limit before version 2."""
MAX_BYTES = 1 << 62

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
"""By number in `DataType`; 11 to 13, 15 and 16 are quantised numbers, stored as plain ones."""


def read_shape(data: memoryview, field: Field) -> tuple[int, ...]:
    """Return the sizes in a TensorShapeProto, refusing what no array can have."""
    shape: list[int] = []
    for dimension in fields(data, field.begin, field.end):
        if dimension.number == 2 and dimension.wire == BYTES:
            sizes = [signed(found.value) for found in fields(data, dimension.begin, dimension.end) if found.number == 1]
            shape.append(sizes[-1] if sizes else 0)
        if len(shape) > MAX_RANK:
            raise WireError(f"a shape of more than {MAX_RANK} dimensions")
    if any(size < 0 for size in shape):
        raise WireError("a shape with a negative size")
    if math.prod(max(size, 1) for size in shape) > MAX_BYTES // 16:
        raise WireError("a shape beyond any memory")
    return tuple(shape)
