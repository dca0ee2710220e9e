"""Where the zeros of a tensor are: patterns (N:M, block, channel), conforming groups, and maps of sparsity."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from prunectl.analysis.tensor_io import iter_slabs, nonzero_mask, storage_numel
from prunectl.errors import UsageError
from prunectl.formats import budgets
from prunectl.formats.base import Array, ModelFile, Tensor

if TYPE_CHECKING:
    from prunectl.analysis.stats import ModelStats

Mask = NDArray[np.bool_]
GroupCounts = tuple[int, int]
"""Number of groups that follow the pattern, and number of all groups."""

_NM = re.compile(r"([1-9]\d*):([1-9]\d*)")
_BLOCK = re.compile(r"block:([1-9]\d*)x([1-9]\d*)")


@dataclass(frozen=True, slots=True)
class NMPattern:
    """`N:M`: at least N zeros in every M consecutive weights along the inputs."""

    zeros: int
    group: int

    @property
    def row_alignment(self) -> int:
        """The number of rows of a slab must be a multiple of this."""
        return self.group

    def count_conforming(self, tensor: Tensor, kept: Mask) -> GroupCounts | None:
        """Count groups of M; None if the number of inputs is not a multiple of M."""
        axis = tensor.reduction_axis
        if axis is None or tensor.shape[axis] % self.group:
            return None
        groups = np.moveaxis(kept, axis, -1).reshape(-1, self.group)
        return int(np.count_nonzero(groups.sum(axis=1) <= self.group - self.zeros)), len(groups)


@dataclass(frozen=True, slots=True)
class BlockPattern:
    """`block:RxC`: zeros fill whole blocks of the kernel, viewed as a matrix (inputs, outputs)."""

    rows: int
    columns: int

    @property
    def row_alignment(self) -> int:
        """The number of rows of a slab must be a multiple of this."""
        return math.lcm(self.rows, self.columns)

    def count_conforming(self, tensor: Tensor, kept: Mask) -> GroupCounts | None:
        """Count blocks, including incomplete ones at the edges; None if the tensor has no output axis."""
        if tensor.out_axis is None:
            return None
        matrix = np.moveaxis(kept, tensor.out_axis, -1).reshape(-1, kept.shape[tensor.out_axis])
        height, width = (-size % step for size, step in zip(matrix.shape, (self.rows, self.columns), strict=True))
        padded = np.pad(matrix, ((0, height), (0, width)), mode="edge")
        filled = padded.reshape(len(padded) // self.rows, self.rows, -1, self.columns).mean(axis=(1, 3))
        return int(np.count_nonzero((filled == 0) | (filled == 1))), filled.size


@dataclass(frozen=True, slots=True)
class ChannelPattern:
    """`channel`: zeros fill whole output channels."""

    row_alignment = 1

    def count_conforming(self, tensor: Tensor, kept: Mask) -> GroupCounts | None:  # noqa: ARG002 - channels are counted over all slabs
        """None: `structured_sparsity` counts channels over all slabs."""
        return None


Pattern = NMPattern | BlockPattern | ChannelPattern


CHANNEL = "channel"
"""Name of the pattern of whole output channels."""
LAYERS = "layers"
"""Name of depth pruning, which removes whole blocks: it is not a pattern of zeros that could be measured."""


def parse(text: str) -> Pattern:
    """Parse a pattern such as `2:4`, `block:1x4` or `channel`."""
    if text == CHANNEL:
        return ChannelPattern()
    if match := _BLOCK.fullmatch(text):
        return BlockPattern(int(match[1]), int(match[2]))
    match = _NM.fullmatch(text)
    if text == LAYERS:
        raise UsageError(
            "the pattern layers works with prune alone", hint="prunectl prune FOLDER -o OUT --pattern layers"
        )
    if match is None:
        raise UsageError(f"{text!r} is not a pattern", hint="write 2:4, block:1x4 or channel")
    zeros, group = int(match[1]), int(match[2])
    if zeros > group:
        raise UsageError(
            f"the pattern {text} needs {zeros} zeros in every {group} weights", hint=f"write {group}:{zeros}"
        )
    return NMPattern(zeros, group)


@dataclass(frozen=True, slots=True)
class StructuredSparsity:
    """Dead channels and conforming groups of a kernel."""

    dead_channels: int
    conforming: float | None
    """Share of the pattern's groups that follow it."""


def structured_sparsity(
    model: ModelFile,
    tensor: Tensor,
    out_axis: int,
    pattern: Pattern | None,
    slabs: Iterable[tuple[int, Array]] | None = None,
) -> StructuredSparsity:
    """Measure the structure of a kernel's zeros, slab by slab; `slabs` passes slabs that were already read."""
    kept_per_channel = np.zeros(tensor.shape[out_axis], np.int64)
    conforming = groups = 0
    for begin, slab in slabs or iter_slabs(model, tensor, pattern.row_alignment if pattern else 1):
        kept = nonzero_mask(slab)
        others = tuple(axis for axis in range(kept.ndim) if axis != out_axis)
        if out_axis == 0:
            kept_per_channel[begin : begin + len(kept)] = kept.sum(axis=others)
        else:
            kept_per_channel += kept.sum(axis=others)
        tally = pattern.count_conforming(tensor, kept) if pattern else None
        if tally is not None:
            conforming, groups = conforming + tally[0], groups + tally[1]
    if isinstance(pattern, ChannelPattern):
        per_channel = tensor.size // len(kept_per_channel)
        conforming, groups = (
            int(np.count_nonzero((kept_per_channel == 0) | (kept_per_channel == per_channel))),
            len(kept_per_channel),
        )
    return StructuredSparsity(int(np.count_nonzero(kept_per_channel == 0)), conforming / groups if groups else None)


FIELDS = 64
"""Largest number of fields of a map along each axis."""
_MAX_MAPS = 24
"""Largest number of maps of a model: the largest tensors have one."""
Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class SparsityMap:
    """Zeros of a tensor, viewed as a matrix (outputs, all other axes) and divided into a grid of fields."""

    name: str
    rows: int
    columns: int
    zeros: Counts
    """Number of zeros in each field."""
    sizes: Counts
    """Number of elements in each field."""
    empty_rows: int
    """Number of outputs whose weights are all zero."""

    @property
    def share(self) -> float:
        """Share of zeros in the whole tensor."""
        return float(self.zeros.sum() / self.sizes.sum())


def sparsity_maps(model: ModelFile, stats: ModelStats) -> tuple[SparsityMap, ...]:
    """The maps of the largest prunable tensors that have zeros, in the order of the file."""
    rows = [row for row in stats.layers if row.is_prunable and row.zeros and not row.tied_to]
    largest = {row.name for row in sorted(rows, key=lambda row: -row.params)[:_MAX_MAPS]}
    return tuple(
        sparsity_map(model, tensor) for tensor in model.tensors if tensor.name in largest and _is_plain(tensor)
    )


def sparsity_map(model: ModelFile, tensor: Tensor) -> SparsityMap:
    """The map of a tensor that is not a scalar; a contiguous tensor is read slab by slab."""
    axis = tensor.out_axis or 0
    rows = tensor.shape[axis]
    columns = tensor.size // rows
    across = math.prod(size for index, size in enumerate(tensor.shape) if index not in {0, axis})
    high, wide = min(rows, FIELDS), min(columns, FIELDS)
    zeros, by_row = np.zeros((high, wide), np.int64), np.zeros(rows, np.int64)
    for begin, slab in iter_slabs(model, tensor, 1):
        matrix = np.moveaxis(~nonzero_mask(slab), axis, 0)
        matrix = matrix.reshape(len(matrix), -1)
        # A slab holds some rows of the matrix (outputs) if these are axis 0, else some columns.
        top, left = (begin, 0) if axis == 0 else (0, begin * across)
        by_row[top : top + len(matrix)] += np.count_nonzero(matrix, axis=1)
        narrow = _sums_by_field(matrix.astype(np.uint8), left, columns, wide, axis=1)
        zeros += _sums_by_field(narrow, top, rows, high, axis=0)
    sizes = np.outer(_bin_sizes(rows, high), _bin_sizes(columns, wide))
    return SparsityMap(tensor.name, rows, columns, zeros, sizes, int(np.count_nonzero(by_row == columns)))


def _sums_by_field(part: NDArray[np.generic], begin: int, size: int, fields: int, *, axis: int) -> Counts:
    """Sums by field along an axis, of a part that starts at index `begin`; zero in fields outside the part."""
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
    """Whether the tensor repeats the elements of its storage at most MAX_REPEATS times, as expanded views may not."""
    return tensor.size <= storage_numel(tensor) * budgets.MAX_REPEATS
