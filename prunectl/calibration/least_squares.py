"""Masked least squares: the kept weights of each row refitted to the outputs of the dense layer.

Each row keeps other columns. A row that keeps few is solved by elimination; one that keeps many by preconditioned
conjugate gradients, which take a product with the whole Gram matrix a step, until they win little, or for as many
steps as elimination would cost. They are taken in single precision, and judged in double.
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

_SETTLED, _WINDOW = 1e-3, 5
"""A row is good enough when so many steps took less than this share off the error that is left of it."""
_EXACT = 1e-14
"""Nor does it matter what they take off an error that is this small beside what the row is to give."""
_MOST_STEPS = 1000
"""Of conjugate gradients, for rows that keep too much to be eliminated."""
_ROUNDS = 3
"""How often those may begin again, with a residual in double precision."""
_FEW_STEPS = 30
"""What they take of a Gram matrix that is well-conditioned: rows that cost less are eliminated at once."""
_GATHERED = 30
"""What it takes besides to gather the matrix of a row that is eliminated."""
_TOGETHER, _NUMBERS = 32, 1 << 21
"""Rows, and numbers of their matrices, that are eliminated in one call."""
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
    damped, target = normal_equations(rows, gram, cross_gram, damp)
    equations = _Equations.of(damped) if (costs >= _FEW_STEPS).any() else None
    solution = np.where(kept, rows if initial is None else initial, 0.0)

    is_eliminated = np.zeros(len(rows), np.bool_)

    def approach(part: slice) -> None:
        # Where steps lead nowhere, what is too large to be eliminated stays as it is.
        is_eliminated[part] = costs[part] < (_FEW_STEPS if equations is not None else _MOST_STEPS)
        some = part.start + np.flatnonzero(~is_eliminated[part])
        for _ in range(_ROUNDS):
            if equations is None or not len(some):
                break
            steps = min(int(costs[some].max()) + _GATHERED, _MOST_STEPS)
            solution[some], is_settled = equations.approach(target[some], kept[some], solution[some], steps)
            some = some[~is_settled]
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
    costs: Float64Array = counts.astype(np.float64) ** 3 / features**2
    costs[counts > max(features // 2, _SMALL)] = _MOST_STEPS
    return costs


def _similar_rows(kept: Mask, rows: Array) -> list[Array]:
    """Rows that keep about as many columns, as many together as their matrices have room."""
    counts = np.count_nonzero(kept[rows], axis=1)
    order = np.argsort(counts, kind="stable")
    rows, counts = rows[order], counts[order]
    chunks, begin = [], 0
    for end in range(1, len(rows) + 1):
        is_full = end - begin == _TOGETHER or (end < len(rows) and (end + 1 - begin) * counts[end] ** 2 > _NUMBERS)
        if is_full or end == len(rows):
            chunks.append(rows[begin:end])
            begin = end
    return chunks


def _eliminate(gram: Float64Array, target: Float64Array, kept: Mask, current: Float64Array) -> Float64Array:
    """The solutions of some rows, or where many are equally good, those closest to the current weights.

    They are solved in one call, since threads wait for each other between short ones.
    """
    columns = [np.flatnonzero(row) for row in kept]
    size = max(map(len, columns))
    grams, targets = np.zeros((len(kept), size, size)), np.zeros((len(kept), size, 1))
    for row, some in enumerate(columns):
        grams[row, : len(some), : len(some)] = gram[np.ix_(some, some)]
        # What a row keeps less than another is made up for by numbers that stay zero.
        np.fill_diagonal(grams[row, len(some) :, len(some) :], 1.0)
        targets[row, : len(some), 0] = target[row, some]
    try:
        solved = np.linalg.solve(grams, targets)[:, :, 0]
    except np.linalg.LinAlgError:
        if len(kept) > 1:
            rows = [slice(row, row + 1) for row in range(len(kept))]
            return np.concatenate([_eliminate(gram, target[row], kept[row], current[row]) for row in rows])
        now = current[kept]
        change = np.linalg.lstsq(grams[0], targets[0, :, 0] - grams[0] @ now, rcond=None)[0]
        solved = (now + change)[np.newaxis]
    solution = current.copy()
    for row, some in enumerate(columns):
        solution[row, some] = solved[row, : len(some)]
    return solution


@dataclass(frozen=True, slots=True)
class _Equations:
    """A damped Gram matrix, as conjugate gradients need it."""

    gram: Float64Array
    correlation: Array
    """The same in features of one size, in single precision: the inverse diagonal is the preconditioner."""
    scale: Float64Array
    """What makes features of one size."""
    factor: Float64Array
    """Of the inverse. It tells by how much rows miss those that nothing is pruned of: no error can be below that."""

    @classmethod
    def of(cls, gram: Float64Array) -> _Equations | None:
        """None where the matrix is not positive definite, as rounding leaves it where inputs hardly differ."""
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
        """What comes of so many steps at most from some rows, and which of them are settled."""
        residual = target - first @ self.gram
        missing = residual @ self.factor.T
        slopes, outputs = residual * self.scale * kept, target * self.scale
        error, enough = _row_products(missing, missing), _EXACT * _row_products(outputs, outputs)
        slopes[error <= enough] = 0.0
        # Steps are relative to how far a row is off, so that no number is too large or too small for them.
        size = np.sqrt(_row_products(slopes, slopes))
        error, enough = _ratio(error, size**2), _ratio(enough, size**2)
        left = (slopes * _ratio(np.ones_like(size), size)[:, np.newaxis]).astype(np.float32)
        mask, direction, energy = kept.astype(np.float32), left.copy(), _row_products(left, left)
        curvature, change, moved = np.empty_like(left), np.empty_like(left), np.zeros_like(left)
        gains, is_settled = np.zeros((_WINDOW, len(left))), size == 0
        for step in range(steps):
            check_stopped()
            np.matmul(direction, self.correlation, out=curvature)
            curvature *= mask
            length = _ratio(energy, _row_products(direction, curvature))
            moved += np.multiply(direction, length[:, np.newaxis], out=change)
            left -= np.multiply(curvature, length[:, np.newaxis], out=change)
            gains[step % _WINDOW] = length * energy
            error -= gains[step % _WINDOW]
            is_settled = gains.sum(axis=0) <= _SETTLED * np.maximum(error, enough)
            if step + 1 >= _WINDOW and is_settled.all():
                break
            previous, energy = energy, _row_products(left, left)
            direction *= _ratio(energy, previous)[:, np.newaxis]
            direction += left
        way = moved * size[:, np.newaxis] * self.scale
        last = first + way
        # In single precision steps may lead astray: what has won nothing in truth stays as it was.
        has_won = _row_products(way, residual + target - last @ self.gram) > 0
        return np.where(has_won[:, np.newaxis], last, first), is_settled


def _row_products(first: Array, second: Array) -> Array:
    return np.asarray(np.einsum("rf,rf->r", first, second))


def _ratio(numerator: Array, denominator: Array) -> Array:
    """A ratio for each row, zero for rows that are done."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)
