"""How many elements are zero, counted block by block."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from prunectl.errors import InputError
from prunectl.formats.base import Array, ModelFile, Tensor
from prunectl.measuring.blocks import blocks, elements, pieces, repeats

_BITS = {1: np.uint8, 2: np.uint16}
MAX_OVERLAP = 64
"""A view that shows its storage more often than this is made to keep us busy."""


def nonzero(block: Array) -> NDArray[np.bool_]:
    """Mark what is not zero; minus zero is zero, NaN is not."""
    name = block.dtype.name
    if "float" in name and block.dtype.itemsize in _BITS and "fnuz" not in name and "e8m0" not in name:
        # NumPy compares small floats one by one; as integers without their sign bit it is ten times as fast.
        bits = block.view(_BITS[block.dtype.itemsize]) << 1
        return np.asarray(bits != 0)
    return np.asarray(block != np.zeros((), block.dtype))


def count_zeros(model: ModelFile, tensor: Tensor) -> int:
    """Return how many elements of a tensor are zero; the memory it takes is one block."""
    if tensor.size == 0:
        return 0
    if tensor.strides is None:
        return tensor.size - _kept(blocks(model, tensor))
    # An expanded axis shows the same elements again and again: count them once.
    shown = repeats(tensor)
    if tensor.size // shown > elements(tensor) * MAX_OVERLAP:
        raise InputError(
            f"{model.path} is refused: {tensor.name} shows its {elements(tensor)} stored elements {tensor.size} times"
        )
    once = tuple(slice(1) if step == 0 else slice(None) for step in tensor.strides)
    return tensor.size - shown * _kept(pieces(model.read(tensor)[once]))


def _kept(found: Iterable[Array]) -> int:
    return sum(int(np.count_nonzero(nonzero(block))) for block in found)
