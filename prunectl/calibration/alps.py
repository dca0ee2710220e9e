"""ALPS (Meng, Behdin, Wang and Mazumder 2024): prune a layer by the alternating direction method of multipliers (ADMM).

One copy of the weights minimises the error of the layer's outputs, the other is sparse. Multipliers and a growing
penalty draw the copies together until the mask no longer changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from prunectl.calibration.blocks import map_blocks
from prunectl.calibration.sparsegpt import ColumnBlock
from prunectl.calibration.statistics import Float64Array
from prunectl.formats.base import Array
from prunectl.pruning.masks import Mask

_FIRST_PENALTY = 0.1
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""Pairs of the share of kept weights that changed in the last `_PERIOD` iterations, and the growth of the penalty."""
_PERIOD = 3
_MOST_ITERATIONS = 300

Projection = Callable[[Array], Mask]
"""From the magnitude of each weight to the mask of what is pruned."""


def lowest(count: int) -> Projection:
    """Prune the `count` smallest weights of all rows together."""

    def project(sizes: Array) -> Mask:
        pruned = np.zeros(sizes.shape, np.bool_)
        if count:
            pruned.reshape(-1)[np.argpartition(sizes, count - 1, axis=None)[:count]] = True
        return pruned

    return project


def lowest_in(blocks: Sequence[ColumnBlock]) -> Projection:
    """Prune the smallest weights of each row in each block of columns, for an N:M pattern."""
    widths = {(block.end - block.begin, block.drop) for block in blocks}

    def project(sizes: Array) -> Mask:
        pruned = np.zeros(sizes.shape, np.bool_)
        if len(widths) == 1:
            ((width, drop),) = widths
            groups = sizes.reshape(len(sizes), -1, width)
            order = np.argsort(groups, axis=2, kind="stable")[..., :drop]
            np.put_along_axis(pruned.reshape(groups.shape), order, values=True, axis=2)
            return pruned
        for block in blocks:
            order = np.argsort(sizes[:, block.begin : block.end], axis=1, kind="stable")[:, : block.drop]
            np.put_along_axis(pruned[:, block.begin : block.end], order, values=True, axis=1)
        return pruned

    return project


def prune_rows(
    rows: Float64Array, gram: Float64Array, target: Float64Array, project: Projection
) -> tuple[Float64Array, Mask]:
    """Sparse rows whose products with a Gram matrix approximate a target, and the mask of what was pruned.

    The Gram matrix must be damped, so that its diagonal is positive. Weights that are zero already are pruned first.
    """
    # With features scaled to unit norm, the magnitude of a weight is its importance.
    scale = np.sqrt(np.diagonal(gram))
    # Single precision suffices to choose the mask; the kept weights are refitted in double precision afterwards.
    values, vectors = (part.astype(np.float32) for part in np.linalg.eigh(gram / np.outer(scale, scale)))
    # Divided by the largest weight, so that nothing overflows in single precision.
    scaled, zero = rows * scale, rows == 0
    largest = float(np.abs(scaled).max(initial=0)) or 1.0
    scaled_target, sparse = (target / scale / largest).astype(np.float32), (scaled / largest).astype(np.float32)
    multipliers = np.zeros_like(sparse)
    dense, shifted = np.empty_like(sparse), np.empty_like(sparse)
    penalty, before = _FIRST_PENALTY, project(np.where(zero, -1.0, np.abs(sparse)))
    dropped = before

    def minimise(part: slice) -> None:
        right_side = scaled_target[part] - multipliers[part] + penalty * sparse[part]
        dense[part] = (right_side @ vectors / (values + penalty)) @ vectors.T
        shifted[part] = dense[part] + multipliers[part] / penalty

    for iteration in range(1, _MOST_ITERATIONS + 1):
        map_blocks(minimise, len(rows))
        dropped = project(np.where(zero, -1.0, np.abs(shifted)))
        sparse = np.where(dropped, 0.0, shifted)
        multipliers += penalty * (dense - sparse)
        if iteration % _PERIOD:
            continue
        changed = float(np.count_nonzero(dropped != before)) / max(int(np.count_nonzero(~dropped)), 1)
        if not changed:
            break
        penalty *= next(growth for share, growth in _GROWTH if changed >= share)
        before = dropped
    return sparse * (largest / scale), dropped
