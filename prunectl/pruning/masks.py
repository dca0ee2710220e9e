"""Structured masks: N:M and block sparsity, and weights that are not finite."""

from __future__ import annotations

from enum import StrEnum

import numpy as np

from prunectl.errors import InputError
from prunectl.pruning.threshold import Array, Mask

_FEW = 16


class Pooling(StrEnum):
    """How the scores of a block's weights are pooled into one."""

    AVG = "avg"
    MAX = "max"


def lowest_per_group(scores: Array, axis: int, zeros: int, group: int) -> Mask:
    """N:M mask: the N lowest of every M consecutive scores along an axis, ties from the beginning.

    What does not divide is padded with scores that go first, as tfmot pads it: a short group at the end
    loses fewer.
    """
    moved = np.moveaxis(scores, axis, -1)
    missing = -moved.shape[-1] % group
    padded = np.pad(moved, [(0, 0)] * (moved.ndim - 1) + [(0, missing)], constant_values=-1)
    mask = _lowest(padded.reshape(-1, group), zeros).reshape(padded.shape)[..., : moved.shape[-1]]
    return np.ascontiguousarray(np.moveaxis(mask, -1, axis))


def _lowest(groups: Array, count: int) -> Mask:
    """Mark the lowest scores of each row, ties from the left."""
    pruned = np.zeros(groups.shape, np.bool_)
    if groups.shape[1] > _FEW:
        order = np.argsort(groups, axis=1, kind="stable")[:, :count]
        np.put_along_axis(pruned, order, values=True, axis=1)
        return pruned
    # How many go before each: for groups as small as these, comparing all pairs is faster than sorting.
    columns = np.ascontiguousarray(groups.T)
    for index, column in enumerate(columns):
        before = np.zeros(len(groups), np.uint8)
        for other_index, score in enumerate(columns):
            if other_index != index:
                before += (score <= column) if other_index < index else (score < column)
        pruned[:, index] = before < count
    return pruned


def lowest_blocks(scores: Array, out_axis: int, size: tuple[int, int], pool: Pooling, sparsity: float) -> Mask:
    """Block mask: the lowest share of the blocks of a kernel, seen as a matrix of inputs by outputs."""
    moved = np.moveaxis(scores, out_axis, -1)
    matrix = moved.reshape(-1, moved.shape[-1])
    pooled = _block_scores(matrix, size, pool)
    pruned = np.zeros(pooled.size, np.bool_)
    pruned[np.argsort(pooled, axis=None, kind="stable")[: round(sparsity * pooled.size)]] = True
    spread = np.repeat(np.repeat(pruned.reshape(pooled.shape), size[0], axis=0), size[1], axis=1)
    inside = spread[: matrix.shape[0], : matrix.shape[1]].reshape(moved.shape)
    return np.ascontiguousarray(np.moveaxis(inside, -1, out_axis))


def _block_scores(matrix: Array, size: tuple[int, int], pool: Pooling) -> Array:
    """Pooled score of each block; a block at the edge counts what it has."""
    starts = [np.arange(0, length, step) for length, step in zip(matrix.shape, size, strict=True)]
    wide = matrix.astype(np.float64)
    if pool is Pooling.MAX:
        return np.maximum.reduceat(np.maximum.reduceat(wide, starts[0], axis=0), starts[1], axis=1)
    sums = np.add.reduceat(np.add.reduceat(wide, starts[0], axis=0), starts[1], axis=1)
    lengths = [np.diff([*start, length]) for start, length in zip(starts, matrix.shape, strict=True)]
    return np.asarray(sums / np.outer(*lengths))


class NonFinitePolicy(StrEnum):
    """What to do with weights that are NaN or infinite."""

    ERROR = "error"
    ZERO = "zero"
    KEEP = "keep"


def rank_nonfinite(scores: Array, policy: NonFinitePolicy, name: str) -> tuple[Array, Mask | None]:
    """Scores that can be ranked, and the mask of weights that are zeroed whatever their rank."""
    finite = np.isfinite(scores)
    if finite.all():
        return scores, None
    if policy is NonFinitePolicy.ERROR:
        raise InputError(
            f"{name} holds weights that are not finite numbers", hint="--nan zero drops them, --nan keep leaves them"
        )
    if policy is NonFinitePolicy.ZERO:
        return np.where(finite, scores, scores.dtype.type(0)), ~finite
    return np.where(finite, scores, scores.dtype.type(np.inf)), None


def check_pruned_nonfinite(scores: Array, pruned: Mask, policy: NonFinitePolicy, name: str) -> None:
    """Reject a mask that prunes weights which --nan keep must keep."""
    if policy is NonFinitePolicy.KEEP and not np.isfinite(scores[pruned]).all():
        raise InputError(f"{name} holds more weights that are not finite than may stay", hint="--nan zero drops them")
