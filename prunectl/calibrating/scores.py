"""From what was seen to scores: pure functions over the weights of a tensor."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from prunectl.calibrating.columns import matrix, placed
from prunectl.calibrating.moments import Sums, Wide
from prunectl.formats.base import Array

GRADIENTS = ("gradient", "magnitude-gradient", "snip", "fisher")


def with_inputs(weights: Array, norms: Sums) -> Wide:
    """Return |weight| times the norm of what it is multiplied with."""
    found: Array = np.zeros(weights.shape)
    for part, use in norms.uses.items():
        rows = np.abs(matrix(weights, use).astype(np.float64)) * norms.totals[part][:, np.newaxis]
        found = placed(rows, use, found)
    return found


def by_output(scores: Wide, sums: Sums) -> Wide:
    """Return ranks within each output, so that all outputs lose the same share."""
    found: Array = np.zeros(scores.shape)
    for use in sums.uses.values():
        rows = matrix(scores, use)
        order = np.argsort(rows, axis=-1, kind="stable")
        ranks = np.empty_like(rows)
        np.put_along_axis(ranks, order, np.arange(rows.shape[-1], dtype=rows.dtype), axis=-1)
        found = placed(ranks, use, found)
    return found


def is_covered(shape: tuple[int, ...], sums: Sums) -> bool:
    """Whether every output of a tensor was seen."""
    seen = np.zeros(shape, np.bool_)
    for use in sums.uses.values():
        seen = placed(np.ones(matrix(seen, use).shape, np.bool_), use, seen)
    return bool(seen.all())


def outputs_of(shape: tuple[int, ...], sums: Sums) -> int:
    """Return how many outputs of a tensor were seen."""
    return sum(math.prod(matrix(np.broadcast_to(np.False_, shape), use).shape[:2]) for use in sums.uses.values())


def of_gradients(strategy: str) -> Callable[[Wide], Wide]:
    """Return what a strategy asks of the gradient g of each batch: |g|, g or its square."""
    asked: dict[str, Callable[[Wide], Wide]] = {"snip": np.array, "fisher": np.square}
    return asked.get(strategy, np.abs)


def with_gradients(strategy: str, weights: Array, gradients: Wide) -> Wide:
    """Return the scores of a strategy from the means over batches of what it asks for."""
    wide = weights.astype(np.float64)
    if strategy == "gradient":
        return gradients
    if strategy == "fisher":
        return np.asarray(np.square(wide) * gradients)
    return np.asarray(np.abs(wide * gradients))
