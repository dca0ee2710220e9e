"""Masked least squares: the kept weights of each row refitted to the outputs of the dense layer.

Each row keeps different columns. A row that keeps few is solved by elimination. A row that keeps many is solved by
preconditioned conjugate gradients, which multiply by the whole Gram matrix in each step, until they gain little or
have cost as much as elimination. Their steps are taken in single precision, and the result is checked in double.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prunectl.calibration.blocks import map_blocks
from prunectl.calibration.sparsegpt import dampen, inverse_factor
from prunectl.calibration.statistics import Float64Array
from prunectl.formats.base import Array
from prunectl.formats.workers import check_stopped
from prunectl.pruning.masks import Mask

_TOLERANCE, _WINDOW = 1e-3, 5
"""A row has converged when its last steps (the window) reduced the remaining error by less than this share."""
_EXACT = 1e-14
"""A squared error below this share of the squared, scaled right-hand side of a row counts as zero."""
_MOST_STEPS = 1000
"""Most steps of conjugate gradients, and the cost of rows that keep too many columns to be eliminated."""
_ROUNDS = 3
"""Most rounds of conjugate gradients for such rows; each starts from a residual in double precision."""
_FEW_STEPS = 30
"""Steps that a well-conditioned Gram matrix takes: rows that cost less than this are eliminated at once."""
_GATHER_STEPS = 30
"""The cost of gathering the matrix of a row for elimination, in steps of conjugate gradients."""
_ROWS, _NUMBERS = 32, 1 << 21
"""Most rows, and most numbers in their matrices, that are eliminated in one call."""
_SMALL = 1024
"""Kept columns whose matrix takes little memory; rows that keep more, and more than half, are not eliminated."""


def least_squares_refit(
    rows: Float64Array,
    gram: Float64Array,
    cross_gram: Float64Array,
    kept: Mask,
    damp: float,
    *,
    initial: Float64Array | None = None,
) -> Float64Array:
    """Rows that are zero where pruned, with the other weights refitted to the dense outputs.

    `gram` holds products of the inputs of the pruned model, `cross_gram` those with the inputs of the dense model.
    Damping pulls towards the dense weights and not towards zero: without evidence a weight keeps its value.
    """
    costs = _elimination_costs(kept)
    damped, target = normal_equations(rows, gram, cross_gram, damp)
    equations = _Equations.of(damped) if (costs >= _FEW_STEPS).any() else None
    solution = np.where(kept, rows if initial is None else initial, 0.0)

    is_eliminated = np.zeros(len(rows), np.bool_)

    def approach(part: slice) -> None:
        # Rows that are too large to be eliminated keep what the steps reached; the others fall back to elimination.
        is_eliminated[part] = costs[part] < (_FEW_STEPS if equations is not None else _MOST_STEPS)
        some = part.start + np.flatnonzero(~is_eliminated[part])
        for _ in range(_ROUNDS):
            if equations is None or not len(some):
                break
            steps = min(int(costs[some].max()) + _GATHER_STEPS, _MOST_STEPS)
            solution[some], has_converged = equations.approach(target[some], kept[some], solution[some], steps)
            some = some[~has_converged]
            is_large = costs[some] >= _MOST_STEPS
            is_eliminated[some[~is_large]] = True
            some = some[is_large]

    map_blocks(approach, len(rows))
    chunks = _similar_rows(kept, np.flatnonzero(is_eliminated))

    def eliminate(part: slice) -> None:
        for some in chunks[part]:
            solution[some] = _eliminate(damped, target[some], kept[some], solution[some])

    map_blocks(eliminate, len(chunks), 1)
    return solution


def normal_equations(
    rows: Float64Array, gram: Float64Array, cross_gram: Float64Array, damp: float
) -> tuple[Float64Array, Float64Array]:
    """The damped Gram matrix and the right-hand side of the normal equations, whose solution fits the dense outputs."""
    damped = dampen(gram, damp)
    pull = np.diagonal(damped) - np.diagonal(gram)
    target = np.empty_like(rows)

    def multiply(part: slice) -> None:
        target[part] = rows[part] @ cross_gram.T + rows[part] * pull

    map_blocks(multiply, len(rows))
    return damped, target


def _elimination_costs(kept: Mask) -> Float64Array:
    """The cost of eliminating each row, in steps of conjugate gradients; `_MOST_STEPS` if it keeps too many columns."""
    features = kept.shape[1]
    counts = np.count_nonzero(kept, axis=1)
    costs: Float64Array = counts.astype(np.float64) ** 3 / features**2
    costs[counts > max(features // 2, _SMALL)] = _MOST_STEPS
    return costs


def _similar_rows(kept: Mask, rows: Array) -> list[Array]:
    """Chunks of rows that keep a similar number of columns, as many as may be eliminated in one call."""
    counts = np.count_nonzero(kept[rows], axis=1)
    order = np.argsort(counts, kind="stable")
    rows, counts = rows[order], counts[order]
    chunks, begin = [], 0
    for end in range(1, len(rows) + 1):
        is_full = end - begin == _ROWS or (end < len(rows) and (end + 1 - begin) * counts[end] ** 2 > _NUMBERS)
        if is_full or end == len(rows):
            chunks.append(rows[begin:end])
            begin = end
    return chunks


def _eliminate(gram: Float64Array, target: Float64Array, kept: Mask, current: Float64Array) -> Float64Array:
    """The solutions of some rows; where a matrix is singular, the solution that is closest to the current weights.

    The rows are solved in one call, since threads wait for each other between short calls.
    """
    columns = [np.flatnonzero(row) for row in kept]
    size = max(map(len, columns))
    grams, targets = np.zeros((len(kept), size, size)), np.zeros((len(kept), size, 1))
    for row, some in enumerate(columns):
        grams[row, : len(some), : len(some)] = gram[np.ix_(some, some)]
        # Rows that keep fewer columns than the longest are padded with unknowns that are zero.
        np.fill_diagonal(grams[row, len(some) :, len(some) :], 1.0)
        targets[row, : len(some), 0] = target[row, some]
    try:
        solved = np.linalg.solve(grams, targets)[:, :, 0]
    except np.linalg.LinAlgError:
        if len(kept) > 1:
            rows = [slice(row, row + 1) for row in range(len(kept))]
            return np.concatenate([_eliminate(gram, target[row], kept[row], current[row]) for row in rows])
        weights = current[kept]
        change = np.linalg.lstsq(grams[0], targets[0, :, 0] - grams[0] @ weights, rcond=None)[0]
        solved = (weights + change)[np.newaxis]
    solution = current.copy()
    for row, some in enumerate(columns):
        solution[row, some] = solved[row, : len(some)]
    return solution


@dataclass(frozen=True, slots=True)
class _Equations:
    """A damped Gram matrix, prepared for preconditioned conjugate gradients."""

    gram: Float64Array
    correlation: Array
    """The Gram matrix scaled to a unit diagonal, in single precision: the inverse diagonal is the preconditioner."""
    scale: Float64Array
    """The scale of each feature: one over the root of the diagonal."""
    factor: Float64Array
    """Cholesky factor of the inverse: gives how much the error of a row exceeds that of the unpruned solution."""

    @classmethod
    def of(cls, gram: Float64Array) -> _Equations | None:
        """The equations of a Gram matrix; None if rounding made it indefinite, as where inputs hardly differ."""
        try:
            factor = inverse_factor(gram)
        except np.linalg.LinAlgError:
            return None
        scale = 1 / np.sqrt(np.diagonal(gram))
        correlation = np.empty(gram.shape, np.float32)

        def multiply(part: slice) -> None:
            correlation[part] = gram[part] * scale[part, np.newaxis] * scale

        map_blocks(multiply, len(gram))
        return cls(gram, correlation, scale, factor)

    def approach(self, target: Float64Array, kept: Mask, first: Float64Array, steps: int) -> tuple[Float64Array, Mask]:
        """Take at most `steps` steps from some rows; return the new rows, and which of them have converged."""
        residual = target - first @ self.gram
        whitened = residual @ self.factor.T
        slopes, outputs = residual * self.scale * kept, target * self.scale
        error, enough = _row_products(whitened, whitened), _EXACT * _row_products(outputs, outputs)
        slopes[error <= enough] = 0.0
        # Each row is divided by the norm of its gradient, so that no number overflows or underflows in float32.
        size = np.sqrt(_row_products(slopes, slopes))
        error, enough = _ratio(error, size**2), _ratio(enough, size**2)
        left = (slopes * _ratio(np.ones_like(size), size)[:, np.newaxis]).astype(np.float32)
        mask, direction, energy = kept.astype(np.float32), left.copy(), _row_products(left, left)
        curvature, change, moved = np.empty_like(left), np.empty_like(left), np.zeros_like(left)
        gains, has_converged = np.zeros((_WINDOW, len(left))), size == 0
        for step in range(steps):
            check_stopped()
            np.matmul(direction, self.correlation, out=curvature)
            curvature *= mask
            length = _ratio(energy, _row_products(direction, curvature))
            moved += np.multiply(direction, length[:, np.newaxis], out=change)
            left -= np.multiply(curvature, length[:, np.newaxis], out=change)
            gains[step % _WINDOW] = length * energy
            error -= gains[step % _WINDOW]
            has_converged = gains.sum(axis=0) <= _TOLERANCE * np.maximum(error, enough)
            if step + 1 >= _WINDOW and has_converged.all():
                break
            previous, energy = energy, _row_products(left, left)
            direction *= _ratio(energy, previous)[:, np.newaxis]
            direction += left
        total = moved * size[:, np.newaxis] * self.scale
        last = first + total
        # Single-precision steps may go wrong: rows whose error has not fallen in double precision are not changed.
        has_improved = _row_products(total, residual + target - last @ self.gram) > 0
        return np.where(has_improved[:, np.newaxis], last, first), has_converged


def _row_products(first: Array, second: Array) -> Array:
    return np.asarray(np.einsum("rf,rf->r", first, second))


def _ratio(numerator: Array, denominator: Array) -> Array:
    """A ratio for each row; zero where the denominator is."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
