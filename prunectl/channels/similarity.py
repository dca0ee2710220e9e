"""How alike are the channels of a kernel? Pure functions over rows: those that others replace may go."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from prunectl.formats.base import Array

Rows = NDArray[np.float64]
"""The weights of a channel in each row."""
Alike = NDArray[np.float64]
"""How alike every two rows are: 1 if they are the same."""
Scores = NDArray[np.float64]
THRESHOLD = 0.9
_CHUNK_BYTES = 32 << 20


def cosine(rows: Rows) -> Alike:
    """Return the cosine of the angle between every two rows; rows of zeros are like each other alone."""
    norms = _norms(rows)
    across = np.outer(norms, norms)
    found = np.divide(rows @ rows.T, across, out=np.zeros_like(across), where=across > 0)
    return _settled(np.clip(found, -1, 1), norms)


def euclidean(rows: Rows) -> Alike:
    """Return 1 less the distance over the product of norms, not below 0; rows of zeros are like each other alone."""
    norms = _norms(rows)
    across = np.outer(norms, norms)
    # Not from products of rows: where two are nearly the same, little would be left of the difference.
    apart = np.sqrt(_summed(rows, lambda one, other: np.square(one - other)))
    found = 1 - np.divide(apart, across, out=np.ones_like(across), where=across > 0)
    return _settled(np.maximum(found, 0), norms)


def iou(rows: Rows) -> Alike:
    """Return the sum of what every two rows share over that of what either has; rows of zeros share all.

    Two weights of one sign share the smaller and have the larger; those of opposite signs share nothing and have both.
    Where no weight is negative, this is the sum of minima over the sum of maxima.
    """
    parts = np.concatenate([np.maximum(rows, 0), np.maximum(-rows, 0)], axis=1)
    shared = _summed(parts, np.minimum)
    sizes = parts.sum(axis=1)
    either = sizes[:, np.newaxis] + sizes - shared
    return _settled(np.divide(shared, either, out=np.zeros_like(either), where=either > 0), sizes)


METRICS: Mapping[str, Callable[[Rows], Alike]] = {"cosine": cosine, "euclidean": euclidean, "iou": iou}


def replaced(alike: Alike) -> Scores:
    """Return for each row how well one that stays replaces it, as rows go one by one.

    Of the two that are most alike the later goes, again and again, so that those with the highest scores are what goes
    first however many are asked for. The last row has -1, as nothing is left to replace it.
    """
    count = len(alike)
    # What replaces a row stands before it: of a pair it is the later one that goes.
    before = np.where(np.tri(count, k=-1, dtype=np.bool_), alike, -np.inf)
    best = before.max(axis=1, initial=-np.inf)
    found = np.full(count, -1.0)
    for _ in range(count - 1):
        # The last of equals, so that of many that are the same the first stays.
        gone = count - 1 - int(np.argmax(best[::-1]))
        found[gone] = best[gone]
        best[gone] = -np.inf
        followers = gone + 1 + np.flatnonzero(before[gone + 1 :, gone] == best[gone + 1 :])
        before[:, gone] = -np.inf
        best[followers] = np.where(np.isneginf(best[followers]), -np.inf, before[followers].max(axis=1))
    return found


def first_of_each(alike: Alike, threshold: float = THRESHOLD) -> NDArray[np.bool_]:
    """Return which rows stay if each goes that is at least so much like an earlier one that stays."""
    stays = np.zeros(len(alike), np.bool_)
    for at, line in enumerate(alike):
        stays[at] = not (line[:at][stays[:at]] >= threshold).any()
    return stays


def difference(weights: Array, axis: int, metric: str = "cosine") -> Scores:
    """Return how far each index of an axis is from what replaces it, from 0 to 2: the lowest go first."""
    rows = np.moveaxis(weights, axis, 0).reshape(weights.shape[axis], -1).astype(np.float64)
    return np.asarray(1 - replaced(METRICS[metric](rows)))


def _norms(rows: Rows) -> NDArray[np.float64]:
    return np.asarray(np.sqrt(np.square(rows).sum(axis=1)))


def _settled(alike: Alike, sizes: NDArray[np.float64]) -> Alike:
    """Return what is alike with 1 for each row and itself, and for every two rows of zeros."""
    empty = sizes == 0
    found = np.where(np.outer(empty, empty), 1.0, alike)
    np.fill_diagonal(found, 1.0)
    return found


def _summed(rows: Rows, of: Callable[[Rows, Rows], Rows]) -> Alike:
    """Return the sum over the weights of something between every two rows, a few rows at a time."""
    step = max(_CHUNK_BYTES // max(rows.nbytes, 1), 1)
    parts = [of(rows[begin : begin + step, np.newaxis], rows).sum(axis=2) for begin in range(0, len(rows), step)]
    return np.concatenate(parts) if parts else np.zeros((0, 0))
