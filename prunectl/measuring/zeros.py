"""How many elements are zero, counted block by block."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from prunectl.errors import InputError
from prunectl.formats.base import Array, ModelFile, Tensor
from prunectl.measuring.blocks import blocks, elements, pieces, repeats

_SIGN_FIRST = frozenset({"float16", "bfloat16", "float8_e3m4", "float8_e4m3", "float8_e4m3fn", "float8_e5m2"})
"""Small floats whose first bit is the sign and nothing else: those that know a minus zero."""
_NO_ZERO = "float8_e8m0fnu"
"""Powers of two, none of which is zero, though NumPy's zero becomes the smallest."""
MAX_OVERLAP = 64
"""A view that shows its storage more often than this is made to keep us busy."""


def nonzero(block: Array) -> NDArray[np.bool_]:
    """Mark what is not zero; minus zero is zero, NaN is not."""
    if block.dtype.name in _SIGN_FIRST:
        # NumPy compares small floats one by one; as integers without their sign bit it is ten times as fast.
        bits = block.view(f"u{block.dtype.itemsize}") << 1
        return np.asarray(bits != 0)
    if block.dtype.name == _NO_ZERO:
        return np.ones(block.shape, np.bool_)
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
