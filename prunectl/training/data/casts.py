"""Numbers in the type that a model takes, never changed in value without a word."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from prunectl.errors import InputError
from prunectl.formats.base import Array

_BYTE = np.dtype(np.uint8)
_FLOAT = np.dtype(np.float32)
_WHOLE = np.dtype(np.int64)
_HALVES = frozenset({"float16", "float64"})


@dataclass(frozen=True, slots=True)
class Cast:
    """From one type of numbers to another."""

    dtype: np.dtype[Any]
    said: str

    def apply(self, array: Array, what: str) -> Array:
        """Return the array in the other type; whole numbers must be whole and within it."""
        with np.errstate(invalid="ignore", over="ignore"):
            found = array.astype(self.dtype)
        if self.dtype.kind in "iu" and not np.array_equal(found, array):
            raise InputError(f"{what} must be whole numbers that a {self.dtype} can hold, and some are not")
        return found


def of_input(found: np.dtype[Any], wanted: str) -> Cast | None:
    """Return what makes an input of one type fit a model that takes another; an unknown one is taken for floats."""
    if wanted.startswith(("int", "uint", "bool")):
        return None if found == wanted else Cast(np.dtype(wanted), f"{found} is cast to {wanted}")
    dtype = np.dtype(wanted) if wanted in _HALVES else _FLOAT
    if found == dtype or (not wanted and found.kind in "bi"):
        return None
    said = f"{found} is cast to {dtype}"
    if found == _BYTE:
        said += " as it is; a model that was trained on x / 255 needs ?norm=unit, one on x / 16 ?norm=/16"
    return Cast(dtype, said)


def of_target(found: np.dtype[Any]) -> Cast | None:
    """Return what makes targets whole 64-bit or 32-bit floating-point numbers, as losses take them."""
    dtype = _FLOAT if found.kind == "f" else _WHOLE
    return None if found == dtype else Cast(dtype, f"{found} is cast to {dtype}")
