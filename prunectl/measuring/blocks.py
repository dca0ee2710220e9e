"""A tensor seen piece by piece, so that memory does not grow with it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from prunectl.formats import extents
from prunectl.formats.base import Array, ModelFile, Tensor
from prunectl.formats.extents import Extent
from prunectl.formats.workers import check_stopped


def lies_flat(tensor: Tensor) -> bool:
    """Whether its elements lie one after another in a file, as this machine reads them."""
    return tensor.storage.extent is not None and tensor.strides is None and not tensor.storage.big_endian


def blocks(model: ModelFile, tensor: Tensor) -> Iterator[Array]:
    """Yield the elements of a tensor in some order, each block valid until the next."""
    extent = tensor.storage.extent
    if extent is not None and lies_flat(tensor):
        begin = extent.offset + tensor.start * tensor.dtype.itemsize
        yield from extents.blocks(Extent(extent.path, begin, tensor.nbytes), tensor.dtype)
    else:
        yield from pieces(model.read(tensor))


def pieces(array: Array) -> Iterator[Array]:
    """Yield an array in contiguous pieces of at most one block."""
    check_stopped()
    if array.nbytes <= extents.BLOCK_BYTES or array.ndim == 0:
        yield np.ascontiguousarray(array)
        return
    height = extents.BLOCK_BYTES * len(array) // array.nbytes
    if height:
        for begin in range(0, len(array), height):
            check_stopped()
            yield np.ascontiguousarray(array[begin : begin + height])
    else:
        for row in array:
            yield from pieces(row)


def slabs(model: ModelFile, tensor: Tensor, aligned: int) -> Iterator[tuple[int, Array]]:
    """Yield where a slab begins along the first axis, and the slab; its height is a multiple of ``aligned``."""
    row_bytes = tensor.nbytes // tensor.shape[0] if tensor.size else 0
    if not row_bytes:
        return
    height = max(extents.BLOCK_BYTES // row_bytes // aligned, 1) * aligned
    extent = tensor.storage.extent
    whole = None if extent is not None and lies_flat(tensor) else model.read(tensor)
    for begin in range(0, tensor.shape[0], height):
        if whole is not None:
            yield begin, whole[begin : begin + height]
        elif extent is not None:
            rows = min(height, tensor.shape[0] - begin)
            offset = extent.offset + tensor.start * tensor.dtype.itemsize + begin * row_bytes
            run = Extent(extent.path, offset, rows * row_bytes)
            shape = (rows, *tensor.shape[1:])
            yield begin, np.concatenate(list(map(np.copy, extents.blocks(run, tensor.dtype)))).reshape(shape)


def same_numbers(model: ModelFile, tensor: Tensor, other_model: ModelFile, other: Tensor) -> bool:
    """Whether a tensor holds the numbers of another, bit for bit once they are of its type."""
    if not tensor.shape:
        return _as_bytes(model.read(tensor), other) == _as_bytes(other_model.read(other), other)
    theirs = other_model.read(other)
    return all(
        _as_bytes(slab, other) == _as_bytes(theirs[begin : begin + len(slab)], other)
        for begin, slab in slabs(model, tensor, 1)
    )


def _as_bytes(array: Array, other: Tensor) -> bytes:
    return array.astype(other.dtype, copy=False).tobytes()


def elements(tensor: Tensor) -> int:
    """Return how many elements the storage of a tensor holds."""
    return tensor.storage.nbytes // tensor.dtype.itemsize


def repeats(tensor: Tensor) -> int:
    """Return how often an expanded view shows each of its elements."""
    steps = tensor.strides or ()
    return math.prod(size for size, step in zip(tensor.shape, steps, strict=False) if step == 0)
