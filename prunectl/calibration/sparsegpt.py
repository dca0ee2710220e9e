"""Optimal brain surgery on the rows of a layer: drop weights one column after the other, let the rest make up for it.

After Frantar and Alistarh 2023 (SparseGPT). The loss is the square of what the layer's outputs change by; its second
derivative is the sum of the products of the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prunectl.calibration.statistics import Float64Array
from prunectl.errors import WorkError
from prunectl.pruning.threshold import Mask

_MOST_DAMP = 1e3


@dataclass(frozen=True, slots=True)
class ColumnBlock:
    """Which of the columns are decided together, and how many of their weights go."""

    begin: int
    end: int
    drop: int
    is_by_row: bool
    """Whether each row loses so many, and not all rows together."""


def unstructured_blocks(rows: int, features: int, drop: int, block: int) -> list[ColumnBlock]:
    """Return columns in blocks that lose so many weights together, to the last one."""
    ends = [*range(block, features, block), features]
    begins = [0, *ends[:-1]]
    total = rows * features
    return [
        ColumnBlock(begin, end, drop * end * rows // total - drop * begin * rows // total, is_by_row=False)
        for begin, end in zip(begins, ends, strict=True)
    ]


def nm_blocks(features: int, channels: int, zeros: int, group: int) -> list[ColumnBlock]:
    """Return columns in groups that lose N of M in every row; a group at the end of the channels may be short."""
    found = []
    for first in range(0, features, channels):
        for begin in range(first, first + channels, group):
            end = min(begin + group, first + channels)
            found.append(ColumnBlock(begin, end, max(zeros - (group - (end - begin)), 0), is_by_row=True))
    return found


def prune_rows(
    rows: Float64Array, products: Float64Array, parts: list[ColumnBlock], damp: float, block: int
) -> tuple[Float64Array, Mask]:
    """Return rows with new numbers, and what was dropped."""
    found, dropped = rows.astype(np.float64), np.zeros(rows.shape, np.bool_)
    inverse, is_dead = inverse_cholesky(products, damp)
    decide = {part.begin: part for part in parts}
    features = found.shape[1]
    for begin in range(0, features, block):
        end = min(begin + block, features)
        errors = np.zeros((len(found), end - begin))
        for at in range(begin, end):
            if at in decide:
                part = decide[at]
                # A part may reach into the next block, whose weights still lack what this one's errors do to them.
                late = found[:, end : part.end] - errors @ inverse[begin:end, end : part.end]
                seen = np.concatenate([found[:, at : min(part.end, end)], late], axis=1)
                dropped[:, at : part.end] = _lowest(seen, inverse, is_dead, part)
            column = found[:, at]
            error = np.where(dropped[:, at], column, 0.0) / inverse[at, at]
            found[:, at:end] -= np.outer(error, inverse[at, at:end])
            errors[:, at - begin] = error
        found[:, end:] -= errors @ inverse[begin:end, end:]
    found[dropped] = 0.0
    return found, dropped


def scores(rows: Float64Array, inverse: Float64Array, is_dead: Mask, begin: int = 0) -> Float64Array:
    """Return what dropping each weight costs, once those before it are settled."""
    end = begin + rows.shape[1]
    found: Float64Array = np.square(rows / np.diagonal(inverse)[begin:end])
    # Nothing ever goes into these, so that they cost nothing.
    found[:, is_dead[begin:end]] = 0.0
    return found


def _lowest(rows: Float64Array, inverse: Float64Array, is_dead: Mask, part: ColumnBlock) -> Mask:
    found = scores(rows, inverse, is_dead, part.begin)
    dropped = np.zeros(found.shape, np.bool_)
    if part.is_by_row:
        order = np.argsort(found, axis=1, kind="stable")[:, : part.drop]
        np.put_along_axis(dropped, order, values=True, axis=1)
    else:
        dropped.reshape(-1)[np.argsort(found, axis=None, kind="stable")[: part.drop]] = True
    return dropped


def inverse_cholesky(products: Float64Array, damp: float) -> tuple[Float64Array, Mask]:
    """Return the upper root of the inverse of damped products, and which features never had an input."""
    is_dead: Mask = np.diagonal(products) <= 0
    damped = dampen(products, damp)
    while damp < _MOST_DAMP:
        try:
            return np.linalg.cholesky(np.linalg.inv(damped)).T, is_dead
        except np.linalg.LinAlgError:
            damp *= 10
            damped = dampen(products, damp)
    raise WorkError("the inputs of a layer depend on each other too much", hint="more --samples, or --param damp=0.1")


def dampen(products: Float64Array, damp: float) -> Float64Array:
    """Return products with a share of their mean size added to the diagonal."""
    found = products.copy()
    diagonal = np.diagonal(found).copy()
    diagonal[diagonal <= 0] = 1.0
    np.fill_diagonal(found, diagonal + damp * diagonal.mean())
    return found
