"""Reading of tensors piece by piece, so that memory use does not grow with their size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from prunectl.errors import InputError
from prunectl.formats import budgets, extents
from prunectl.formats.base import Array, ModelFile, Tensor, dtype_name
from prunectl.formats.extents import Extent
from prunectl.formats.workers import check_stopped


def is_contiguous(tensor: Tensor) -> bool:
    """Whether the elements are contiguous in a file, in the byte order of this machine."""
    return tensor.storage.extent is not None and tensor.strides is None and not tensor.storage.big_endian


def blocks(model: ModelFile, tensor: Tensor) -> Iterator[Array]:
    """Yield the elements of a tensor in some order, each block valid until the next."""
    extent = tensor.storage.extent
    if extent is not None and is_contiguous(tensor):
        begin = extent.offset + tensor.start * tensor.dtype.itemsize
        yield from extents.blocks(Extent(extent.path, begin, tensor.nbytes), tensor.dtype)
    elif extent is None and model.stream is not None:
        yield from model.stream(tensor)
    else:
        yield from iter_blocks(model.read(tensor))


def iter_blocks(array: Array) -> Iterator[Array]:
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
            yield from iter_blocks(row)


def iter_slabs(model: ModelFile, tensor: Tensor, alignment: int) -> Iterator[tuple[int, Array]]:
    """Yield slabs along the first axis, each with the index of its first row; heights are multiples of `alignment`."""
    row_bytes = tensor.nbytes // tensor.shape[0] if tensor.size else 0
    if not row_bytes:
        return
    height = max(extents.BLOCK_BYTES // row_bytes // alignment, 1) * alignment
    extent = tensor.storage.extent
    array = None if extent is not None and is_contiguous(tensor) else model.read(tensor)
    for begin in range(0, tensor.shape[0], height):
        if array is not None:
            yield begin, array[begin : begin + height]
        elif extent is not None:
            rows = min(height, tensor.shape[0] - begin)
            offset = extent.offset + tensor.start * tensor.dtype.itemsize + begin * row_bytes
            run = Extent(extent.path, offset, rows * row_bytes)
            shape = (rows, *tensor.shape[1:])
            yield begin, np.concatenate(list(map(np.copy, extents.blocks(run, tensor.dtype)))).reshape(shape)


def bitwise_equal(model: ModelFile, tensor: Tensor, other_model: ModelFile, other: Tensor) -> bool:
    """Whether a tensor, cast to the dtype of another, equals it bit for bit."""
    if not tensor.shape:
        return _as_bytes(model.read(tensor), other) == _as_bytes(other_model.read(other), other)
    other_array = other_model.read(other)
    return all(
        _as_bytes(slab, other) == _as_bytes(other_array[begin : begin + len(slab)], other)
        for begin, slab in iter_slabs(model, tensor, 1)
    )


def _as_bytes(array: Array, other: Tensor) -> bytes:
    return array.astype(other.dtype, copy=False).tobytes()


def storage_numel(tensor: Tensor) -> int:
    """Number of elements in the storage of a tensor."""
    return tensor.storage.nbytes // tensor.dtype.itemsize


def expansion_factor(tensor: Tensor) -> int:
    """How many times an expanded view (with strides of 0) repeats each of its elements."""
    steps = tensor.strides or ()
    return math.prod(size for size, step in zip(tensor.shape, steps, strict=False) if step == 0)


_SIGN_FIRST = frozenset({"float16", "bfloat16", "float8_e3m4", "float8_e4m3", "float8_e4m3fn", "float8_e5m2"})
"""Small floats that have a minus zero: their first bit is the sign."""
_NO_ZERO = "float8_e8m0fnu"
"""A dtype of powers of two, without a zero: NumPy converts 0 to the smallest of them."""


def nonzero_mask(block: Array) -> NDArray[np.bool_]:
    """Mask of elements that are not zero; minus zero is zero, NaN is not."""
    name = dtype_name(block.dtype)
    if name in _SIGN_FIRST:
        # NumPy compares small floats one by one; comparing integers without the sign bit is ten times as fast.
        bits = block.view(f"u{block.dtype.itemsize}") << 1
        return np.asarray(bits != 0)
    if name == _NO_ZERO:
        return np.ones(block.shape, np.bool_)
    return np.asarray(block != np.zeros((), block.dtype))


def count_zeros(model: ModelFile, tensor: Tensor) -> int:
    """Number of zeros of a tensor; it takes the memory of one block."""
    if tensor.size == 0:
        return 0
    if tensor.strides is None:
        return tensor.size - _count_nonzero(blocks(model, tensor))
    # An expanded axis repeats the same elements: count them once.
    repeats = expansion_factor(tensor)
    if tensor.size // repeats > storage_numel(tensor) * budgets.MAX_REPEATS:
        raise InputError(
            f"{model.path} is refused: {tensor.name} repeats its {storage_numel(tensor)} stored elements "
            f"{tensor.size} times"
        )
    distinct = tuple(slice(1) if step == 0 else slice(None) for step in tensor.strides)
    return tensor.size - repeats * _count_nonzero(iter_blocks(model.read(tensor)[distinct]))


def _count_nonzero(pieces: Iterable[Array]) -> int:
    return sum(int(np.count_nonzero(nonzero_mask(block))) for block in pieces)


class ProgressBar(Protocol):
    """A progress bar that counts bytes or items."""

    def advance(self, nbytes: int) -> None:
        """Add finished work."""


ProgressFactory = Callable[[str, int], AbstractContextManager[ProgressBar]]
"""Creates a progress bar from a label and a total."""


class _NoProgress:
    def advance(self, nbytes: int) -> None:
        """Count nothing."""


class Items(int):
    """A total that counts items; a plain integer counts bytes."""


def no_progress(_label: str, _total_bytes: int) -> AbstractContextManager[ProgressBar]:
    """A progress bar that shows nothing."""
    return nullcontext(_NoProgress())
