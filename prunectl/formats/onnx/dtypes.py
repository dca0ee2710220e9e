"""Types of elements in ONNX tensors, and the fields that hold each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from prunectl.formats.onnx.proto import DOUBLES, FLOATS, INT32S, INT64S, UINT64S

STRING = 8


@dataclass(frozen=True, slots=True)
class Code:
    """A type of element: where it stands when it is not raw, and its bits when it is."""

    dtype: np.dtype[Any]
    field: int
    bits: int


def _code(kind: Any, field: int = INT32S, bits: int = 0) -> Code:
    dtype = np.dtype(kind)
    return Code(dtype, field, bits or dtype.itemsize * 8)


CODES: dict[int, Code] = {
    1: _code(np.float32, FLOATS),
    2: _code(np.uint8),
    3: _code(np.int8),
    4: _code(np.uint16),
    5: _code(np.int16),
    6: _code(np.int32),
    7: _code(np.int64, INT64S),
    9: _code(np.bool_),
    10: _code(np.float16),
    11: _code(np.float64, DOUBLES),
    12: _code(np.uint32, UINT64S),
    13: _code(np.uint64, UINT64S),
    14: _code(np.complex64, FLOATS),
    15: _code(np.complex128, DOUBLES),
    16: _code(ml_dtypes.bfloat16),
    17: _code(ml_dtypes.float8_e4m3fn),
    18: _code(ml_dtypes.float8_e4m3fnuz),
    19: _code(ml_dtypes.float8_e5m2),
    20: _code(ml_dtypes.float8_e5m2fnuz),
    21: _code(ml_dtypes.uint4, bits=4),
    22: _code(ml_dtypes.int4, bits=4),
    23: _code(ml_dtypes.float4_e2m1fn, bits=4),
    24: _code(ml_dtypes.float8_e8m0fnu),
    25: _code(ml_dtypes.uint2, bits=2),
    26: _code(ml_dtypes.int2, bits=2),
}
