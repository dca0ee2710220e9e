"""SparseGPT: optimal brain surgeon on the rows of a layer, column by column, the rest compensating.

After Frantar and Alistarh 2023 (SparseGPT). The loss is the square of what the layer's outputs change by; its second
derivative is the sum of the products of the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prunectl.calibration.statistics import Float64Array
from prunectl.errors import WorkError
from prunectl.pruning.masks import Mask

_MOST_DAMP = 1e3


@dataclass(frozen=True, slots=True)
class ColumnBlock:
    """Columns whose mask is decided together, and how many of their weights are pruned."""

    begin: int
    end: int
    drop: int
    is_by_row: bool
    """Whether each row loses so many, and not all rows together."""


def unstructured_blocks(rows: int, features: int, drop: int, block: int) -> list[ColumnBlock]:
    """Columns in blocks that lose so many weights together, to the last one."""
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
    rows: Float64Array, products: Float64Array, parts: list[ColumnBlock], damp: float, block: int
) -> tuple[Float64Array, Mask]:
    """Pruned rows with their compensated weights, and the mask."""
    updated, dropped = rows.astype(np.float64), np.zeros(rows.shape, np.bool_)
    inverse, is_dead = inverse_cholesky(products, damp)
    blocks = {block_of_columns.begin: block_of_columns for block_of_columns in parts}
    features = updated.shape[1]
    for begin in range(0, features, block):
        end = min(begin + block, features)
        errors = np.zeros((len(updated), end - begin))
        for column in range(begin, end):
            if column in blocks:
                block_of_columns = blocks[column]
                # A part may reach into the next block, whose weights still lack what this one's errors do to them.
                beyond = (
                    updated[:, end : block_of_columns.end] - errors @ inverse[begin:end, end : block_of_columns.end]
                )
                candidates = np.concatenate([updated[:, column : min(block_of_columns.end, end)], beyond], axis=1)
                dropped[:, column : block_of_columns.end] = _lowest(candidates, inverse, is_dead, block_of_columns)
            weights = updated[:, column]
            error = np.where(dropped[:, column], weights, 0.0) / inverse[column, column]
            updated[:, column:end] -= np.outer(error, inverse[column, column:end])
            errors[:, column - begin] = error
        updated[:, end:] -= errors @ inverse[begin:end, end:]
    updated[dropped] = 0.0
    return updated, dropped


def scores(rows: Float64Array, inverse: Float64Array, is_dead: Mask, begin: int = 0) -> Float64Array:
    """Optimal brain surgeon cost of each weight: its square over that of the inverse Hessian's Cholesky diagonal."""
    end = begin + rows.shape[1]
    costs: Float64Array = np.square(rows / np.diagonal(inverse)[begin:end])
    # Nothing ever goes into these, so that they cost nothing.
    costs[:, is_dead[begin:end]] = 0.0
    return costs


def _lowest(rows: Float64Array, inverse: Float64Array, is_dead: Mask, block: ColumnBlock) -> Mask:
    costs = scores(rows, inverse, is_dead, block.begin)
    dropped = np.zeros(costs.shape, np.bool_)
    if block.is_by_row:
        order = np.argsort(costs, axis=1, kind="stable")[:, : block.drop]
        np.put_along_axis(dropped, order, values=True, axis=1)
    else:
        dropped.reshape(-1)[np.argsort(costs, axis=None, kind="stable")[: block.drop]] = True
    return dropped


def inverse_cholesky(products: Float64Array, damp: float) -> tuple[Float64Array, Mask]:
    """Upper Cholesky factor of the inverse of a damped Gram matrix, and the features without input."""
    is_dead: Mask = np.diagonal(products) <= 0
    damped = dampen(products, damp)
    while damp < _MOST_DAMP:
        try:
            return np.linalg.cholesky(np.linalg.inv(damped)).T, is_dead
        except np.linalg.LinAlgError:
            damp *= 10
            damped = dampen(products, damp)
    raise WorkError("the Gram matrix of a layer's inputs is singular", hint="use more --samples, or --param damp=0.1")


def dampen(products: Float64Array, damp: float) -> Float64Array:
    """A Gram matrix with a share of its mean diagonal added to the diagonal."""
    damped = products.copy()
    diagonal = np.diagonal(damped).copy()
    diagonal[diagonal <= 0] = 1.0
    np.fill_diagonal(damped, diagonal + damp * diagonal.mean())
    return damped
