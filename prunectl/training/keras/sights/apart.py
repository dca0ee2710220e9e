"""A depthwise convolution in NumPy: what comes between the two steps of a separable one, which Keras does not show."""

from __future__ import annotations

from itertools import product

import numpy as np

from prunectl.training.network import Array
from prunectl.training.sights import Window


def convolved_apart(x: Array, kernel: Array, window: Window) -> Array:
    """Return what a depthwise kernel makes of channels, from (examples, channels, space)."""
    padded = np.pad(x, ((0, 0), (0, 0), *window.pads))
    sizes, multiplier = kernel.shape[:-2], kernel.shape[-1]
    made = tuple(
        (length - (size - 1) * dilation - 1) // stride + 1
        for length, size, dilation, stride in zip(
            padded.shape[2:], sizes, window.dilations, window.strides, strict=True
        )
    )
    found = np.zeros((*x.shape[:2], multiplier, *made), np.float32)
    for place in product(*map(range, sizes)):
        seen = tuple(
            slice(at * dilation, at * dilation + (count - 1) * stride + 1, stride)
            for at, dilation, count, stride in zip(place, window.dilations, made, window.strides, strict=True)
        )
        weight = kernel[place].reshape(*kernel.shape[-2:], *(1,) * len(sizes))
        found += padded[(slice(None), slice(None), *seen)][:, :, np.newaxis] * weight
    return found.reshape(len(x), -1, *made)
