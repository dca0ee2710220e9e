"""Masked least squares: the kept weights of each row refitted to the outputs of the dense layer.

Each row keeps other columns. A row that keeps few is solved by elimination; one that keeps many by preconditioned
conjugate gradients, which take a product with the whole Gram matrix a step, for as many steps as elimination would
cost.
"""

from __future__ import annotations

import numpy as np

from prunectl.calibration.blocks import map_blocks
from prunectl.calibration.sparsegpt import dampen
from prunectl.calibration.statistics import Float64Array
from prunectl.formats.workers import check_stopped
from prunectl.pruning.masks import Mask

_EXACT = 1e-20
"""The square of how far off a row may be, relative to what it is to give."""
_MOST_STEPS = 1000
"""Of conjugate gradients, for rows that keep too much to be eliminated."""
_FEW_STEPS = 30
"""What they take of a Gram matrix that is well-conditioned: rows that cost less are eliminated at once."""
_SMALL = 1024
"""Kept columns whose matrix is small beside anything else; of more than half of all, it would not be."""


def least_squares_refit(
    rows: Float64Array,
    gram: Float64Array,
    cross_gram: Float64Array,
    kept: Mask,
    damp: float,
    *,
    initial: Float64Array | None = None,
) -> Float64Array:
    """Rows that are zero where pruned, and fit the dense outputs elsewhere.

    Among each other and across are the products of the inputs now, and of them with the inputs before. Damping pulls
    towards the old weights and not towards zero: without evidence a weight stays as it is.
    """
    damped, target = normal_equations(rows, gram, cross_gram, damp)
    first = rows if initial is None else initial
    solution = np.empty_like(rows)

    def solve(part: slice) -> None:
        keep = kept[part]
        solution[part] = _solve(damped, np.where(keep, target[part], 0.0), keep, np.where(keep, first[part], 0.0))

    map_blocks(solve, len(rows))
    return solution


def normal_equations(
    rows: Float64Array, gram: Float64Array, cross_gram: Float64Array, damp: float
) -> tuple[Float64Array, Float64Array]:
    """A damped Gram matrix, and what the rows that fit the dense outputs best give when they are multiplied by it."""
    damped = dampen(gram, damp)
    pull = np.diagonal(damped) - np.diagonal(gram)
    target = np.empty_like(rows)

    def multiply(part: slice) -> None:
        target[part] = rows[part] @ cross_gram.T + rows[part] * pull

    map_blocks(multiply, len(rows))
    return damped, target


def _solve(gram: Float64Array, target: Float64Array, kept: Mask, initial: Float64Array) -> Float64Array:
    """Solve the masked normal equations of some rows, each in the way that is cheaper for it."""
    features = len(gram)
    counts = np.count_nonzero(kept, axis=1)
    costs = counts.astype(np.float64) ** 3 / (2 * features**2)
    costs[counts > max(features // 2, _SMALL)] = _MOST_STEPS
    is_open = costs >= _FEW_STEPS
    solution = initial
    if is_open.any():
        steps = min(int(costs[is_open].max()), _MOST_STEPS)
        solution[is_open], is_exact = _conjugate_gradients(
            gram, target[is_open], kept[is_open], initial[is_open], steps
        )
        is_open[is_open] = is_exact | (costs[is_open] >= _MOST_STEPS)
    for row in np.flatnonzero(~is_open):
        check_stopped()
        columns = np.flatnonzero(kept[row])
        solution[row, columns] = _eliminate(
            gram[np.ix_(columns, columns)], target[row, columns], solution[row, columns]
        )
    return solution


def _eliminate(gram: Float64Array, target: Float64Array, current: Float64Array) -> Float64Array:
    """The solution of one row, or where many are equally good, the one that is closest to the current weights."""
    try:
        return np.asarray(np.linalg.solve(gram, target), np.float64)
    except np.linalg.LinAlgError:
        return current + np.linalg.lstsq(gram, target - gram @ current, rcond=None)[0]


def _conjugate_gradients(
    gram: Float64Array, target: Float64Array, kept: Mask, solution: Float64Array, steps: int
) -> tuple[Float64Array, Mask]:
    """What comes of so many steps at most, with the inverse diagonal as preconditioner, and which rows are exact."""
    scale = 1 / np.diagonal(gram)
    limit = _EXACT * (target * target * scale).sum(axis=1)
    residual = target - np.where(kept, solution @ gram, 0.0)
    preconditioned = residual * scale
    direction, energy = preconditioned, (residual * preconditioned).sum(axis=1)
    for _ in range(steps):
        if (energy <= limit).all():
            break
        check_stopped()
        curvature = np.where(kept, direction @ gram, 0.0)
        step = _row_ratio(energy, (direction * curvature).sum(axis=1))
        solution = solution + step * direction
        residual = residual - step * curvature
        preconditioned = residual * scale
        previous, energy = energy, (residual * preconditioned).sum(axis=1)
        direction = preconditioned + _row_ratio(energy, previous) * direction
    return solution, energy <= limit


def _row_ratio(numerator: Float64Array, denominator: Float64Array) -> Float64Array:
    """A ratio for each row, zero for rows that are done."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)[:, np.newaxis]
