"""ALPS: which weights of a layer stay, and as what, by the alternating direction method of multipliers (ADMM).

After Meng, Behdin, Wang and Mazumder 2024 (ALPS). One copy of the weights minimises the error of the layer's outputs,
another has the zeros; the multipliers draw them together, faster and faster, until the zeros stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from prunectl.calibration.statistics import Float64Array
from prunectl.pruning.masks import Mask

_FIRST_PENALTY = 0.1
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""By how much the penalty grows, for the share of the kept weights that were others three turns before."""
_TURNS = 3
_MOST_TURNS = 300

Projection = Callable[[Float64Array], Mask]
"""From the size of each weight to which of them are pruned."""


def prune_rows(rows: Float64Array, gram: Float64Array, target: Float64Array, project: Projection) -> Mask:
    """Which weights are pruned, of rows whose products with a Gram matrix shall come near a target.

    The Gram matrix is damped, so that no feature is without a scale.
    """
    # With features of one size the largest weights are those that matter most.
    scale = np.sqrt(np.diagonal(gram))
    values, vectors = np.linalg.eigh(gram / np.outer(scale, scale))
    wanted, sparse = target / scale, rows * scale
    multipliers = np.zeros_like(sparse)
    penalty, before = _FIRST_PENALTY, project(np.abs(sparse))
    for turn in range(1, _MOST_TURNS + 1):
        dense = ((wanted - multipliers + penalty * sparse) @ vectors / (values + penalty)) @ vectors.T
        moved = dense + multipliers / penalty
        dropped = project(np.abs(moved))
        sparse = np.where(dropped, 0.0, moved)
        multipliers += penalty * (dense - sparse)
        if turn % _TURNS:
            continue
        changed = np.count_nonzero(dropped != before) / max(np.count_nonzero(~dropped), 1)
        if not changed:
            break
        penalty *= next(growth for share, growth in _GROWTH if changed >= share)
        before = dropped
    return dropped
