"""Weights times masks, and weights as 16-bit floats: block by block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from prunectl.errors import InputError, abbreviated
from prunectl.formats.base import Array
from prunectl.formats.extents import BLOCK_BYTES

HALF_MAX = 65504.0
HALF = np.dtype(np.float16)
HALVED = frozenset({np.dtype(np.float32), np.dtype(np.float64)})
"""What becomes 16-bit floats when this is asked for."""


def pieces(arrays: Sequence[Array]) -> Iterator[tuple[Array, ...]]:
    """Yield arrays of one shape piece by piece along their first axis, the pieces in C order."""
    first = arrays[0]
    if first.nbytes <= BLOCK_BYTES or first.ndim == 0:
        yield tuple(arrays)
        return
    rows = max(1, BLOCK_BYTES * len(first) // first.nbytes)
    for begin in range(0, len(first), rows):
        yield tuple(array[begin : begin + rows] for array in arrays)


def apply_mask(weights: Array, masks: Sequence[Array]) -> Iterator[Array]:
    """Yield the weights times their masks: plain zeros where a mask is zero, whatever stood there."""
    for weight, *factors in pieces([weights, *masks]):
        product = weight
        for factor in factors:
            with np.errstate(all="ignore"):
                times = (product * factor.astype(weight.dtype)).astype(weight.dtype)
            product = np.where(factor.astype(np.float32) != 0, times, np.zeros((), weight.dtype))
        yield product


def broadcast_mask(weights: Array, mask: Array) -> Array | None:
    """A mask in the shape of its weights: one for each row counts for all of it; None where it does not fit."""
    if mask.shape == weights.shape:
        return mask
    if weights.ndim > 1 and mask.shape == weights.shape[:1]:
        return np.broadcast_to(mask.reshape(-1, *[1] * (weights.ndim - 1)), weights.shape)
    return None


def to_float16(blocks: Iterable[Array], path: object, name: str) -> Iterator[Array]:
    """Yield 32-bit and wider floats as 16-bit ones, unless one of them is too big."""
    for block in blocks:
        for (piece,) in pieces([block]):
            sizes = np.abs(piece)
            if np.any((sizes > HALF_MAX) & np.isfinite(piece)):
                biggest = float(sizes[np.isfinite(piece)].max())
                raise InputError(
                    f"{path} holds {biggest:g} in {abbreviated(name)}, "
                    f"and a 16-bit float reaches no further than {HALF_MAX:g}",
                    hint="leave out --half",
                )
            yield piece.astype(HALF)
