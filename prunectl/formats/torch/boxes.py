"""Tensors sharded into boxes: check that the boxes tile the tensor, and read its elements in C order."""

from __future__ import annotations

import math
import os
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.errors import InputError
from prunectl.formats import budgets, extents
from prunectl.formats.base import Array
from prunectl.formats.extents import Extent

_BLOCK_BYTES = 512
_MOST_AXES = 4
"""Most axes along which a tensor may be split: a box has 2 to the power of this number of corners."""
_SLAB_BYTES = 32 << 20
"""Bytes assembled at once: with fewer, columns split over hundreds of ranks would be read in tiny pieces."""


@dataclass(frozen=True, slots=True)
class TensorChunk:
    """A box of a tensor, and its extent in a file: that of its torch.save archive, or that of its elements."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    extent: Extent


def is_tiled(shape: tuple[int, ...], parts: Sequence[TensorChunk]) -> bool:
    """Whether boxes fill a shape without a gap and without an overlap.

    They do if their signed corners (the sign flips with each axis along which the corner is the end of the box) add up
    to those of the whole: the sums are the mixed difference of how many boxes cover an element, and determine it.
    """
    if not all(part.sizes for part in parts) or not shape:
        return len(parts) == 1 and parts[0].sizes == shape
    axes = [axis for axis, length in enumerate(shape) if any(part.sizes[axis] != length for part in parts)]
    if len(axes) > _MOST_AXES or any(
        part.offsets[axis] for part in parts for axis in range(len(shape)) if axis not in axes
    ):
        return False
    counts: Counter[tuple[int, ...]] = Counter()
    for part in parts:
        for corner, sign in _corners([part.offsets[axis] for axis in axes], [part.sizes[axis] for axis in axes]):
            counts[corner] += sign
    for corner, sign in _corners([0] * len(axes), [shape[axis] for axis in axes]):
        counts[corner] -= sign
    return not any(counts.values())


def _corners(offsets: Sequence[int], sizes: Sequence[int]) -> Iterator[tuple[tuple[int, ...], int]]:
    for ends in product((0, 1), repeat=len(offsets)):
        corner = tuple(offset + end * size for offset, end, size in zip(offsets, ends, sizes, strict=True))
        yield corner, -1 if sum(ends) % 2 else 1


def merged(shape: tuple[int, ...], boxes: Sequence[TensorChunk], dtype: np.dtype[Any]) -> Iterator[Array]:
    """Yield the elements of a tensor in C order from boxes that tile it, whose extents hold raw elements."""
    ends = {end for box in boxes for end in (box.offsets[0], box.offsets[0] + box.sizes[0])}
    cuts = sorted(ends)
    pieces = sum(bisect_left(cuts, box.offsets[0] + box.sizes[0]) - bisect_left(cuts, box.offsets[0]) for box in boxes)
    if pieces > budgets.MAX_BOX_PIECES:
        raise InputError(
            f"a tensor in {boxes[0].extent.path.parent} is refused: its parts would be read in {pieces:,} pieces"
        )
    waiting = sorted(boxes, key=lambda box: box.offsets, reverse=True)
    across: list[TensorChunk] = []
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    for begin, end in pairwise(cuts):
        across = [box for box in across if begin < box.offsets[0] + box.sizes[0]]
        while waiting and waiting[-1].offsets[0] == begin:
            across.append(waiting.pop())
        if len(across) == 1:
            yield from extents.blocks(_rows(across[0], begin, end), dtype)
        elif row_bytes > _SLAB_BYTES:
            for row in range(begin, end):
                inner = [TensorChunk(box.offsets[1:], box.sizes[1:], _rows(box, row, row + 1)) for box in across]
                yield from merged(shape[1:], inner, dtype)
        else:
            yield from _slabs(shape[1:], across, begin, end, dtype)


def _slabs(
    shape: tuple[int, ...], boxes: Sequence[TensorChunk], begin: int, end: int, dtype: np.dtype[Any]
) -> Iterator[Array]:
    """Yield rows that are split over several boxes, as many at once as fit, to read each box in few, long pieces."""
    height = min(max(_SLAB_BYTES // (math.prod(shape) * dtype.itemsize), 1), end - begin)
    slab = np.empty((height, *shape), dtype)
    in_file_order = sorted(boxes, key=lambda box: (box.extent.path, box.extent.offset))
    for top in range(begin, end, height):
        count = min(height, end - top)
        for box in in_file_order:
            rows = np.empty((count, *box.sizes[1:]), dtype)
            flat, done = rows.reshape(-1), 0
            for piece in extents.blocks(_rows(box, top, top + count), dtype):
                flat[done : done + piece.size] = piece
                done += piece.size
            slab[:count, *slices(box)[1:]] = rows
        yield slab[:count]


def _rows(box: TensorChunk, begin: int, end: int) -> Extent:
    """The extent of some rows of a box; the rows are counted in the whole tensor."""
    row_bytes = box.extent.nbytes // box.sizes[0]
    return Extent(box.extent.path, box.extent.offset + (begin - box.offsets[0]) * row_bytes, (end - begin) * row_bytes)


def slices(box: TensorChunk) -> tuple[slice, ...]:
    """The box as an index into the whole tensor."""
    return tuple(slice(offset, offset + size) for offset, size in zip(box.offsets, box.sizes, strict=True))


def allocated_bytes(folder: Path, suffix: str) -> int:
    """Disk space of the ranks' files, without the holes of sparse files: it limits the cost of their metadata."""
    with os.scandir(folder) as entries:
        files = [entry for entry in entries if entry.name.endswith(suffix)]
    return sum(file.stat(follow_symlinks=False).st_blocks * _BLOCK_BYTES for file in files)


def pickle_scale(allocated: int) -> int:
    """The factor on the limits of a checkpoint's pickles, from the disk space of its files."""
    return max(1, min(allocated // budgets.PICKLE_SCALE_BYTES, budgets.MAX_PICKLE_SCALE))
