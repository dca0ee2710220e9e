"""Where are the zeros of a tensor? Its share of them, field by field, as on a map."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prunectl.analysis.stats import ModelStats
from prunectl.analysis.tensor_io import iter_slabs, nonzero_mask, storage_numel
from prunectl.formats import budgets
from prunectl.formats.base import ModelFile, Tensor

FIELDS = 64
"""A map has so many fields in each direction, at most."""
_MOST = 24
"""Tensors of a model that have a map: the largest."""
Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class SparsityMap:
    """A tensor as a matrix of outputs by all else, cut into fields."""

    name: str
    rows: int
    columns: int
    zeros: Counts
    """Of each field."""
    sizes: Counts
    """How many elements each field has."""
    empty_rows: int
    """Outputs whose weights are all zero."""

    @property
    def share(self) -> float:
        """Share of zeros in the whole tensor."""
        return float(self.zeros.sum() / self.sizes.sum())


def sparsity_maps(model: ModelFile, stats: ModelStats) -> tuple[SparsityMap, ...]:
    """The maps of the largest prunable tensors that have zeros, in the order of the file."""
    rows = [row for row in stats.layers if row.is_prunable and row.zeros and not row.tied_to]
    largest = {row.name for row in sorted(rows, key=lambda row: -row.params)[:_MOST]}
    return tuple(
        sparsity_map(model, tensor) for tensor in model.tensors if tensor.name in largest and _is_plain(tensor)
    )


def sparsity_map(model: ModelFile, tensor: Tensor) -> SparsityMap:
    """The map of a tensor that is no scalar; where it lies flat, a piece of it is in memory at a time."""
    axis = tensor.out_axis or 0
    rows = tensor.shape[axis]
    columns = tensor.size // rows
    across = math.prod(size for index, size in enumerate(tensor.shape) if index not in {0, axis})
    high, wide = min(rows, FIELDS), min(columns, FIELDS)
    zeros, by_row = np.zeros((high, wide), np.int64), np.zeros(rows, np.int64)
    for begin, slab in iter_slabs(model, tensor, 1):
        matrix = np.moveaxis(~nonzero_mask(slab), axis, 0)
        matrix = matrix.reshape(len(matrix), -1)
        # A slab is some of the outputs, or some of what they read.
        top, left = (begin, 0) if axis == 0 else (0, begin * across)
        by_row[top : top + len(matrix)] += np.count_nonzero(matrix, axis=1)
        narrow = _summed(matrix.astype(np.uint8), left, columns, wide, axis=1)
        zeros += _summed(narrow, top, rows, high, axis=0)
    sizes = np.outer(_bin_sizes(rows, high), _bin_sizes(columns, wide))
    return SparsityMap(tensor.name, rows, columns, zeros, sizes, int(np.count_nonzero(by_row == columns)))


def _summed(part: NDArray[np.generic], begin: int, size: int, fields: int, *, axis: int) -> Counts:
    """The sums by field of a part of an axis that begins somewhere on it; zero in fields that it is not in."""
    field_of = np.arange(begin, begin + part.shape[axis]) * fields // size
    touched, starts = np.unique(field_of, return_index=True)
    sums = np.add.reduceat(part, starts, axis=axis, dtype=np.int64)
    shape = [fields if index == axis else length for index, length in enumerate(part.shape)]
    sums_by_field = np.zeros(shape, np.int64)
    sums_by_field[(slice(None),) * axis + (touched,)] = sums
    return sums_by_field


def _bin_sizes(size: int, fields: int) -> Counts:
    return np.bincount(np.arange(size) * fields // size, minlength=fields).astype(np.int64)


def _is_plain(tensor: Tensor) -> bool:
    """Whether it is no view that shows its elements again and again."""
    return tensor.size <= storage_numel(tensor) * budgets.MAX_REPEATS
