"""Which weights go at which sparsity, and what share of a tensor goes with them: exact, from the weights alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from prunectl.calibrating.sensitivity.found import SPARSITIES
from prunectl.formats.base import Array
from prunectl.measuring.zeros import nonzero
from prunectl.pruning.selection import threshold
from prunectl.pruning.strategies import Place, magnitude

Levels = NDArray[np.uint8]
"""For each weight, the number of the first sparsity at which it goes; how many there are if it always stays."""


def levels(weights: Array) -> Levels:
    """Return at which sparsity each weight goes: the smallest first, of equal ones the first."""
    scores = magnitude(weights, Place("", 0, 0))
    found = np.full(weights.shape, len(SPARSITIES), np.uint8)
    # From the highest down: what goes early goes at every sparsity after that as well.
    for level in reversed(range(len(SPARSITIES))):
        cut = threshold([lambda: iter([scores])], round(SPARSITIES[level] * weights.size))
        found[cut.drops(0).mark(scores)] = level
    return found


def pruned(weights: Array, gone: Levels, level: int) -> Array:
    """Return the weights of which those are zero that are gone at a sparsity."""
    return np.where(gone <= level, np.zeros((), weights.dtype), weights)


def weight_errors(weights: Array, gone: Levels) -> tuple[float, ...]:
    """Return the norm of what goes over the norm of all, for each sparsity."""
    squares = np.square(weights.astype(np.float64)).reshape(-1)
    shares = np.bincount(gone.reshape(-1), weights=squares, minlength=len(SPARSITIES) + 1)
    total = float(shares.sum())
    lost = np.cumsum(shares)[: len(SPARSITIES)]
    return tuple(float(error) for error in (np.sqrt(lost / total) if total else np.zeros_like(lost)))


def dead_from(weights: Array, gone: Levels, out_axis: int | None) -> float | None:
    """Return the first sparsity at which an output that has weights loses all of them; None if none does."""
    if out_axis is None:
        return None
    others = tuple(axis for axis in range(weights.ndim) if axis != out_axis)
    lives = np.where(nonzero(weights), gone.astype(np.int16), -1).max(axis=others)
    last = lives[lives >= 0].min(initial=len(SPARSITIES))
    return SPARSITIES[last] if last < len(SPARSITIES) else None
