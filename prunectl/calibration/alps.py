"""ALPS: which weights of a layer stay, and as what, by the alternating direction method of multipliers (ADMM).

After Meng, Behdin, Wang and Mazumder 2024 (ALPS). One copy of the weights minimises the error of the layer's outputs,
another has the zeros; multipliers draw them together, faster and faster, until the zeros stay where they are.
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
"""By how much the penalty grows, for the share of the kept weights that were others three turns before."""
_PERIOD = 3
_MOST_TURNS = 300

Projection = Callable[[Array], Mask]
"""From the size of each weight to the mask of what is pruned."""


def lowest(count: int) -> Projection:
    """Prune so many weights of all rows together."""

    def project(sizes: Array) -> Mask:
        pruned = np.zeros(sizes.shape, np.bool_)
        if count:
            pruned.reshape(-1)[np.argpartition(sizes, count - 1, axis=None)[:count]] = True
        return pruned

    return project


def lowest_in(blocks: Sequence[ColumnBlock]) -> Projection:
    """Prune so many weights of each row in each block of columns, as an N:M pattern has them."""
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
    """Rows whose products with a Gram matrix come near a target, and the mask of what is pruned of them.

    The Gram matrix is damped, so that no feature is without a scale. What is zero already goes first.
    """
    # With features of one size the largest weights are those that matter most.
    scale = np.sqrt(np.diagonal(gram))
    # The turns settle which weights stay, for which half the digits do; what stays is refitted with all of them.
    values, vectors = (part.astype(np.float32) for part in np.linalg.eigh(gram / np.outer(scale, scale)))
    # Beside the largest weight of all, so that none is too large for them.
    scaled, zero = rows * scale, rows == 0
    size = float(np.abs(scaled).max(initial=0)) or 1.0
    wanted, sparse = (target / scale / size).astype(np.float32), (scaled / size).astype(np.float32)
    multipliers = np.zeros_like(sparse)
    dense, moved = np.empty_like(sparse), np.empty_like(sparse)
    penalty, before = _FIRST_PENALTY, project(np.where(zero, -1.0, np.abs(sparse)))
    dropped = before

    def minimise(part: slice) -> None:
        pulled = wanted[part] - multipliers[part] + penalty * sparse[part]
        dense[part] = (pulled @ vectors / (values + penalty)) @ vectors.T
        moved[part] = dense[part] + multipliers[part] / penalty

    for turn in range(1, _MOST_TURNS + 1):
        map_blocks(minimise, len(rows))
        dropped = project(np.where(zero, -1.0, np.abs(moved)))
        sparse = np.where(dropped, 0.0, moved)
        multipliers += penalty * (dense - sparse)
        if turn % _PERIOD:
            continue
        changed = float(np.count_nonzero(dropped != before)) / max(int(np.count_nonzero(~dropped)), 1)
        if not changed:
            break
        penalty *= next(growth for share, growth in _GROWTH if changed >= share)
        before = dropped
    return sparse * (size / scale), dropped
