"""SparseGPT (Frantar and Alistarh 2023): optimal brain surgeon, column by column, on all rows of a layer.

The columns that follow compensate for each pruned weight. The loss is the squared error of the layer's outputs; its
Hessian is, up to a factor, the Gram matrix of the layer's inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prunectl.calibration.blocks import map_blocks
from prunectl.calibration.statistics import Float64Array
from prunectl.errors import WorkError
from prunectl.formats.workers import check_stopped
from prunectl.pruning.masks import Mask

_LEAST_DAMP, _MOST_DAMP = 1e-12, 1e3
_ROWS = 128
"""Rows that are compensated in one block of work."""
_INNER = 32
"""Columns within which errors are propagated one by one; to the rest of the block they go together (lazy update)."""
_PANEL = 256
"""Columns of a Cholesky factor that are computed at once."""


@dataclass(frozen=True, slots=True)
class ColumnBlock:
    """Columns whose mask is decided together, and how many of their weights are pruned."""

    begin: int
    end: int
    drop: int
    is_by_row: bool
    """Whether `drop` counts the weights of each row, rather than those of all rows together."""


def unstructured_blocks(rows: int, features: int, drop: int, block: int) -> list[ColumnBlock]:
    """Blocks of columns that lose exactly `drop` weights together."""
    ends = [*range(block, features, block), features]
    begins = [0, *ends[:-1]]
    total = rows * features
    return [
        ColumnBlock(begin, end, drop * end * rows // total - drop * begin * rows // total, is_by_row=False)
        for begin, end in zip(begins, ends, strict=True)
    ]


def nm_blocks(features: int, channels: int, zeros: int, group: int) -> list[ColumnBlock]:
    """Columns in groups that lose N of M in every row; a group at the end of the channels may be short."""
    blocks = []
    for first in range(0, features, channels):
        for begin in range(first, first + channels, group):
            end = min(begin + group, first + channels)
            blocks.append(ColumnBlock(begin, end, max(zeros - (group - (end - begin)), 0), is_by_row=True))
    return blocks


def prune_rows(
    rows: Float64Array, gram: Float64Array, parts: list[ColumnBlock], damp: float, block: int
) -> tuple[Float64Array, Mask]:
    """Pruned rows with compensated weights, and the mask of what was pruned.

    Blocks in which all rows are ranked together have to begin at a multiple of `block`.
    """
    updated, dropped = rows.astype(np.float64), np.zeros(rows.shape, np.bool_)
    inverse, is_dead = inverse_cholesky(gram, damp)
    features = updated.shape[1]
    by_row = {part.begin: part for part in parts if part.is_by_row}
    together = {part.begin: part for part in parts if not part.is_by_row}
    for begin in range(0, features, block):
        end = min(begin + block, features)
        if begin in together:
            columns = slice(begin, together[begin].end)
            dropped[:, columns] = _lowest(updated[:, columns], inverse, is_dead, together[begin])

        def eliminate(some: slice, begin: int = begin, end: int = end) -> None:
            rest, pruned = updated[some], dropped[some]
            # Transposed, so that each column is contiguous in memory.
            by_column = np.ascontiguousarray(rest[:, begin:end].T)
            errors, width = np.zeros_like(by_column), end - begin if by_row else _INNER
            for column in range(begin, end):
                at = column - begin
                inner = at - at % width
                near = min(inner + width, end - begin)
                if column in by_row:
                    part = by_row[column]
                    # The group may reach beyond this block, where the weights are not compensated yet.
                    beyond = rest[:, end : part.end] - errors.T @ inverse[begin:end, end : part.end]
                    candidates = np.concatenate([by_column[at : min(part.end, end) - begin].T, beyond], axis=1)
                    pruned[:, column : part.end] = _lowest(candidates, inverse, is_dead, part)
                errors[at] = np.where(pruned[:, column], by_column[at], 0.0) / inverse[column, column]
                by_column[at:near] -= inverse[column, column : begin + near, np.newaxis] * errors[at]
                if at + 1 == near:
                    by_column[near:] -= inverse[begin + inner : begin + near, begin + near : end].T @ errors[inner:near]
            rest[:, begin:end] = by_column.T
            rest[:, end:] -= errors.T @ inverse[begin:end, end:]

        map_blocks(eliminate, len(updated), _ROWS)
    updated[dropped] = 0.0
    return updated, dropped


def scores(rows: Float64Array, inverse: Float64Array, is_dead: Mask, begin: int = 0) -> Float64Array:
    """Optimal brain surgeon cost of each weight: its square over that of the inverse Hessian's Cholesky diagonal."""
    end = begin + rows.shape[1]
    costs: Float64Array = np.square(rows / np.diagonal(inverse)[begin:end])
    # The input of these features is always zero, so that pruning them costs nothing.
    costs[:, is_dead[begin:end]] = 0.0
    return costs


def _lowest(rows: Float64Array, inverse: Float64Array, is_dead: Mask, block: ColumnBlock) -> Mask:
    costs = scores(rows, inverse, is_dead, block.begin)
    dropped = np.zeros(costs.shape, np.bool_)
    if block.is_by_row:
        order = np.argsort(costs, axis=1, kind="stable")[:, : block.drop]
        np.put_along_axis(dropped, order, values=True, axis=1)
    elif block.drop:
        # Of weights with equal costs the first are pruned.
        limit = np.partition(costs, block.drop - 1, axis=None)[block.drop - 1]
        np.less(costs, limit, out=dropped)
        equal = np.flatnonzero(costs == limit)
        dropped.reshape(-1)[equal[: block.drop - np.count_nonzero(dropped)]] = True
    return dropped


def inverse_cholesky(gram: Float64Array, damp: float) -> tuple[Float64Array, Mask]:
    """Upper Cholesky factor of the inverse of a damped Gram matrix, and the features without input."""
    is_dead: Mask = np.diagonal(gram) <= 0
    while True:
        try:
            return inverse_factor(gram, damped_diagonal(gram, damp)), is_dead
        except np.linalg.LinAlgError as error:
            if damp >= _MOST_DAMP:
                hint = "use more --samples, or --param damp=0.1"
                raise WorkError("the Gram matrix of a layer's inputs is singular", hint=hint) from error
            damp = max(damp * 10, _LEAST_DAMP)


def inverse_factor(matrix: Float64Array, diagonal: Float64Array | None = None) -> Float64Array:
    """The upper Cholesky factor of the inverse, computed by inverting the lower factor of the reversed matrix.

    `diagonal` replaces the diagonal of the matrix.
    """
    size = len(matrix)
    panels = [slice(begin, min(begin + _PANEL, size)) for begin in range(0, size, _PANEL)]
    reversed_matrix, lower = matrix[::-1, ::-1], np.empty_like(matrix)

    def copy(rows: slice) -> None:
        lower[rows, : rows.stop] = reversed_matrix[rows, : rows.stop]

    map_blocks(copy, size, _PANEL)
    np.fill_diagonal(lower, (np.diagonal(matrix) if diagonal is None else diagonal)[::-1])
    diagonal_inverses = []
    for panel in panels:
        corner = np.linalg.cholesky(lower[panel, panel])
        inverse = np.tril(np.linalg.inv(corner))
        diagonal_inverses.append(inverse)
        lower[panel, panel] = corner
        left = size - panel.stop

        def divide(part: slice, panel: slice = panel, inverse: Float64Array = inverse) -> None:
            below = slice(panel.stop + part.start, panel.stop + part.stop)
            lower[below, panel] = lower[below, panel] @ inverse.T

        def subtract(part: slice, panel: slice = panel) -> None:
            below, until = (
                slice(panel.stop + part.start, panel.stop + part.stop),
                slice(panel.stop, panel.stop + part.stop),
            )
            lower[below, until] -= lower[below, panel] @ lower[until, panel].T

        map_blocks(divide, left, _PANEL)
        map_blocks(subtract, left, _PANEL)
    result = np.empty_like(lower)

    def invert(columns: slice) -> None:
        first, width = columns.start // _PANEL, columns.stop - columns.start
        strip = np.zeros((size, width))
        strip[columns] = diagonal_inverses[first]
        for panel, inverse in zip(panels[first + 1 :], diagonal_inverses[first + 1 :], strict=True):
            check_stopped()
            between = slice(columns.start, panel.start)
            strip[panel] = -inverse @ (lower[panel, between] @ strip[between])
        result[:, size - columns.stop : size - columns.start] = strip[::-1, ::-1]

    map_blocks(invert, size, _PANEL)
    return result


def dampen(gram: Float64Array, damp: float) -> Float64Array:
    """A Gram matrix with a share of its mean diagonal added to the diagonal."""
    damped = gram.copy()
    np.fill_diagonal(damped, damped_diagonal(gram, damp))
    return damped


def damped_diagonal(gram: Float64Array, damp: float) -> Float64Array:
    """The diagonal of the damped Gram matrix."""
    diagonal = np.diagonal(gram).copy()
    diagonal[diagonal <= 0] = 1.0
    damped: Float64Array = diagonal + damp * diagonal.mean()
    return damped
