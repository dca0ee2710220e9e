"""Masked least squares: the kept weights of each row refitted to the outputs of the dense layer.

Each row keeps other columns. A row that keeps few is solved by elimination; one that keeps many by preconditioned
conjugate gradients, which take a product with the whole Gram matrix a step, until they win little, or for as many
steps as elimination would cost.
"""

from __future__ import annotations

import numpy as np

from prunectl.calibration.blocks import map_blocks
from prunectl.calibration.sparsegpt import dampen, inverse_cholesky
from prunectl.calibration.statistics import Float64Array
from prunectl.formats.workers import check_stopped
from prunectl.pruning.masks import Mask

_SETTLED, _WINDOW = 1e-2, 5
"""A row is good enough when so many steps took less than this share off the error that is left of it."""
_EXACT = 1e-14
"""Nor does it matter what they take off an error that is this small beside what the row is to give."""
_MOST_STEPS = 1000
"""Of conjugate gradients, for rows that keep too much to be eliminated."""
_FEW_STEPS = 30
"""What they take of a Gram matrix that is well-conditioned: rows that cost less are eliminated at once."""
_GATHERED = 15
"""What it takes besides to gather the matrix of a row that is eliminated."""
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
    costs = _elimination_costs(kept)
    factor = inverse_cholesky(gram, damp)[0] if (costs >= _FEW_STEPS).any() else None
    damped, target = normal_equations(rows, gram, cross_gram, damp)
    solution = np.where(kept, rows if initial is None else initial, 0.0)

    def solve(part: slice) -> None:
        is_open = costs[part] >= _FEW_STEPS
        if factor is not None and is_open.any():
            some = part.start + np.flatnonzero(is_open)
            steps = min(int(costs[some].max()) + _GATHERED, _MOST_STEPS)
            solution[some], is_settled = _conjugate_gradients(
                damped, factor, target[some], kept[some], solution[some], steps=steps
            )
            is_open[is_open] = is_settled | (costs[some] >= _MOST_STEPS)
        for row in part.start + np.flatnonzero(~is_open):
            check_stopped()
            columns = np.flatnonzero(kept[row])
            solution[row, columns] = _eliminate(
                damped[np.ix_(columns, columns)], target[row, columns], solution[row, columns]
            )

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


def _elimination_costs(kept: Mask) -> Float64Array:
    """What it costs to eliminate each row, in steps of conjugate gradients; the most if it keeps too much for that."""
    features = kept.shape[1]
    counts = np.count_nonzero(kept, axis=1)
    costs: Float64Array = counts.astype(np.float64) ** 3 / (2 * features**2)
    costs[counts > max(features // 2, _SMALL)] = _MOST_STEPS
    return costs


def _eliminate(gram: Float64Array, target: Float64Array, current: Float64Array) -> Float64Array:
    """The solution of one row, or where many are equally good, the one that is closest to the current weights."""
    try:
        return np.asarray(np.linalg.solve(gram, target), np.float64)
    except np.linalg.LinAlgError:
        return current + np.linalg.lstsq(gram, target - gram @ current, rcond=None)[0]


def _conjugate_gradients(
    gram: Float64Array, factor: Float64Array, target: Float64Array, kept: Mask, solution: Float64Array, *, steps: int
) -> tuple[Float64Array, Mask]:
    """What comes of so many steps at most, with the inverse diagonal as preconditioner, and which rows are settled.

    The factor of the inverse tells by how much rows miss those that nothing is pruned of: no error can be below that.
    """
    mask, scale = kept.astype(np.float64), 1 / np.diagonal(gram)
    residual = target - solution @ gram
    missing = residual @ factor.T
    error = _row_products(missing, missing)
    enough = _EXACT * _row_products(target * scale, target)
    residual *= mask
    preconditioned = residual * scale
    direction, energy = preconditioned.copy(), _row_products(residual, preconditioned)
    curvature, change = np.empty_like(direction), np.empty_like(direction)
    gains, is_settled = np.zeros((_WINDOW, len(target))), np.zeros(len(target), np.bool_)
    for step in range(steps):
        check_stopped()
        np.matmul(direction, gram, out=curvature)
        curvature *= mask
        length = _ratio(energy, _row_products(direction, curvature))
        solution += np.multiply(direction, length[:, np.newaxis], out=change)
        residual -= np.multiply(curvature, length[:, np.newaxis], out=change)
        gains[step % _WINDOW] = length * energy
        error -= length * energy
        is_settled = gains.sum(axis=0) <= _SETTLED * np.maximum(error, enough)
        if step + 1 >= _WINDOW and is_settled.all():
            break
        np.multiply(residual, scale, out=preconditioned)
        previous, energy = energy, _row_products(residual, preconditioned)
        direction *= _ratio(energy, previous)[:, np.newaxis]
        direction += preconditioned
    return solution, is_settled


def _row_products(first: Float64Array, second: Float64Array) -> Float64Array:
    return np.asarray(np.einsum("rf,rf->r", first, second))


def _ratio(numerator: Float64Array, denominator: Float64Array) -> Float64Array:
    """A ratio for each row, zero for rows that are done."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
