"""Importance scores from activation and gradient statistics: pure functions over a tensor's weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from prunectl.calibration.im2col import scatter_rows, weight_matrix
from prunectl.calibration.statistics import Float64Array, InputStatistics
from prunectl.formats.base import Array

GRADIENTS = ("gradient", "magnitude-gradient", "snip", "fisher")


def wanda_scores(weights: Array, norms: InputStatistics) -> Float64Array:
    """Wanda: |weight| times the norm of its input (Sun et al. 2023)."""
    result: Array = np.zeros(weights.shape)
    for part, use in norms.uses.items():
        rows = np.abs(weight_matrix(weights, use).astype(np.float64)) * norms.totals[part][:, np.newaxis]
        result = scatter_rows(rows, use, result)
    return result


def rank_per_output(scores: Float64Array, sums: InputStatistics) -> Float64Array:
    """Ranks within each output, so that all outputs lose the same share."""
    result: Array = np.zeros(scores.shape)
    for use in sums.uses.values():
        rows = weight_matrix(scores, use)
        order = np.argsort(rows, axis=-1, kind="stable")
        ranks = np.empty_like(rows)
        np.put_along_axis(ranks, order, np.arange(rows.shape[-1], dtype=rows.dtype), axis=-1)
        result = scatter_rows(ranks, use, result)
    return result


def covers_all_outputs(shape: tuple[int, ...], sums: InputStatistics) -> bool:
    """Whether every output of a tensor was observed."""
    covered = np.zeros(shape, np.bool_)
    for use in sums.uses.values():
        covered = scatter_rows(np.ones(weight_matrix(covered, use).shape, np.bool_), use, covered)
    return bool(covered.all())


def count_outputs(shape: tuple[int, ...], sums: InputStatistics) -> int:
    """Number of observed outputs of a tensor."""
    return sum(math.prod(weight_matrix(np.broadcast_to(np.False_, shape), use).shape[:2]) for use in sums.uses.values())


def gradient_reduction(strategy: str) -> Callable[[Float64Array], Float64Array]:
    """What a strategy accumulates of each batch's gradient g: |g|, g or its square."""
    accumulated: dict[str, Callable[[Float64Array], Float64Array]] = {"snip": np.array, "fisher": np.square}
    return accumulated.get(strategy, np.abs)


def gradient_scores(strategy: str, weights: Array, gradients: Float64Array) -> Float64Array:
    """Scores of a gradient strategy from its accumulated means over batches."""
    wide = weights.astype(np.float64)
    if strategy == "gradient":
        return gradients
    if strategy == "fisher":
        return np.asarray(np.square(wide) * gradients)
    return np.asarray(np.abs(wide * gradients))
