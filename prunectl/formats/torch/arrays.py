"""NumPy arrays inside a pickle: their bytes may lie there as they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from prunectl.formats.torch.values import Made, Raw

CODES = frozenset({"b1", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", "c8", "c16"})
MAX_RANK = 64


@dataclass(frozen=True, slots=True)
class FlatArray:
    """An array whose bytes lie in the pickle."""

    raw: Raw
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    big_endian: bool


def is_array(made: Made) -> bool:
    """Whether a call would rebuild a NumPy array."""
    return _module(made) == "numpy" and made.path.rpartition(".")[2] in {"_reconstruct", "_frombuffer"}


def flat_array(made: Made) -> FlatArray | None:
    """Return where the bytes of an array lie; None where they do not lie as they are."""
    if made.path.endswith("_frombuffer"):
        raw, kind, shape, order = (made.arg(index) for index in range(4))
        is_fortran = order == "F"
    elif isinstance(made.state, tuple) and len(made.state) == 5:
        _, shape, kind, is_fortran, raw = made.state
    else:
        return None
    if not isinstance(raw, Raw) or not _is_shape(shape):
        return None
    found = _dtype(kind)
    if found is None or math.prod(shape) * found[0].itemsize != raw.nbytes:
        return None
    strides = None
    if is_fortran is True and sum(length > 1 for length in shape) > 1:
        strides = tuple(math.prod(shape[:axis]) for axis in range(len(shape)))
    return FlatArray(raw, found[0], shape, strides, found[1])


def _dtype(made: Any) -> tuple[np.dtype[Any], bool] | None:
    code = made.arg(0) if isinstance(made, Made) and made.path == "numpy.dtype" else None
    if not isinstance(code, str) or code not in CODES:
        return None
    order = made.state[1] if isinstance(made.state, tuple) and len(made.state) > 1 else "<"
    return np.dtype(code), order == ">"


def _is_shape(shape: Any) -> bool:
    return (
        isinstance(shape, tuple) and len(shape) <= MAX_RANK and all(type(n) is int and 0 <= n < 1 << 32 for n in shape)
    )


def _module(made: Made) -> str:
    return made.path.partition(".")[0]
