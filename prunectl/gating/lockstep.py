"""Two tensors of one shape, seen piece by piece side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from prunectl.errors import InputError
from prunectl.formats import extents
from prunectl.formats.base import Array, ModelFile, Tensor
from prunectl.formats.extents import Extent
from prunectl.measuring.blocks import elements, lies_flat
from prunectl.measuring.zeros import MAX_OVERLAP

_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
Axes = tuple[int, ...] | None
"""The order of axes to see a tensor in; None as it is."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A tensor of a model, its axes in some order."""

    model: ModelFile
    tensor: Tensor
    axes: Axes = None

    def pieces(self, length: int) -> Iterator[Array]:
        """Yield its elements in C order, so many at a time; flat ones are never all in memory."""
        tensor = self.tensor
        if tensor.size > elements(tensor) * MAX_OVERLAP:
            raise InputError(f"{self.model.path} is refused: {tensor.name} shows what it stores {tensor.size} times")
        if self.axes is None and lies_flat(tensor):
            yield from map(partial(_flat, tensor), range(0, tensor.size, length), _lengths(tensor.size, length))
            return
        whole = self.model.read(tensor)
        flat = np.ascontiguousarray(whole if self.axes is None else whole.transpose(self.axes)).reshape(-1)
        for begin in range(0, flat.size, length):
            yield flat[begin : begin + length]


def lockstep(one: Seen, other: Seen) -> Iterator[tuple[Array, Array]]:
    """Yield pieces of both, the same elements at the same time."""
    widest = max(one.tensor.dtype.itemsize, other.tensor.dtype.itemsize)
    length = max(extents.BLOCK_BYTES // widest, 1)
    yield from zip(one.pieces(length), other.pieces(length), strict=True)


def differ(one: Array, other: Array) -> Any:
    """Mark elements that are not the same: to the bit within a type, else in the narrower of the two."""
    if one.dtype != other.dtype:
        narrow = min(one.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
        with np.errstate(over="ignore", invalid="ignore"):
            one, other = one.astype(narrow), other.astype(narrow)
    width = one.dtype.itemsize
    if width in _BITS:
        return one.view(_BITS[width]) != other.view(_BITS[width])
    return (one.view(np.uint8) != other.view(np.uint8)).reshape(-1, width).any(axis=1)


def _lengths(size: int, length: int) -> Iterator[int]:
    return (min(length, size - begin) for begin in range(0, size, length))


def _flat(tensor: Tensor, begin: int, length: int) -> Array:
    extent = tensor.storage.extent
    assert extent is not None
    width = tensor.dtype.itemsize
    run = Extent(extent.path, extent.offset + (tensor.start + begin) * width, length * width)
    blocks = [block.copy() for block in extents.blocks(run, tensor.dtype)]
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
