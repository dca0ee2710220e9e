"""What a tensor makes of the inputs that it is shown with, in loops."""

from __future__ import annotations

import itertools

import numpy as np

from prunectl.training.backend import LayerInput, SlidingWindow, WeightUse
from tests.contract import Array


def meet(weight: Array, sight: LayerInput) -> Array:
    """Return what comes out: features last of a product, channels second of a window."""
    use, weight = sight.use, weight.astype(np.float64)
    inputs = sight.inputs.astype(np.float64)
    if use.window is None:
        return product(weight, use, inputs)
    return (
        spread(weight, use, use.window, inputs) if use.window.is_transposed else slid(weight, use, use.window, inputs)
    )


def product(weight: Array, use: WeightUse, inputs: Array) -> Array:
    stack = weight[None] if use.group_axis is None else np.moveaxis(weight, use.group_axis, 0)
    assert use.in_axis is not None
    axes = [axis for axis in range(weight.ndim) if axis != use.group_axis]
    if axes.index(use.out_axis) > axes.index(use.in_axis):
        stack = stack.swapaxes(1, 2)
    if use.outputs is not None:
        stack = stack[:, slice(*use.outputs)]
    assert len(stack) == use.groups
    runs = np.split(inputs, use.groups, axis=-1)
    return np.concatenate([run @ matrix.T for run, matrix in zip(runs, stack, strict=True)], axis=-1)


def slid(weight: Array, use: WeightUse, window: SlidingWindow, inputs: Array) -> Array:
    kernel = ordered(weight, use)
    padded = np.pad(inputs, [(0, 0), (0, 0), *window.pads])
    size = [
        (length - (reach - 1) * dilation - 1) // stride + 1
        for length, reach, stride, dilation in zip(
            padded.shape[2:], kernel.shape[2:], window.strides, window.dilations, strict=True
        )
    ]
    found = np.zeros((len(inputs), len(kernel), *size))
    outputs, channels = len(kernel) // use.groups, inputs.shape[1] // use.groups
    for out, channel in itertools.product(range(len(kernel)), range(channels)):
        image = padded[:, out // outputs * channels + channel]
        for tap in np.ndindex(*kernel.shape[2:]):
            for place in np.ndindex(*size):
                at = tuple(
                    p * s + t * d for p, s, t, d in zip(place, window.strides, tap, window.dilations, strict=True)
                )
                found[(slice(None), out, *place)] += kernel[(out, channel, *tap)] * image[(slice(None), *at)]
    return found


def spread(weight: Array, use: WeightUse, window: SlidingWindow, inputs: Array) -> Array:
    kernel = ordered(weight, use)  # outputs of a group, all inputs, window
    outputs, channels = len(kernel), inputs.shape[1] // use.groups
    size = [
        (length - 1) * stride + (reach - 1) * dilation + 1
        for length, reach, stride, dilation in zip(
            inputs.shape[2:], kernel.shape[2:], window.strides, window.dilations, strict=True
        )
    ]
    full = np.zeros((len(inputs), outputs * use.groups, *size))
    for out, channel in itertools.product(range(outputs), range(inputs.shape[1])):
        for tap in np.ndindex(*kernel.shape[2:]):
            for place in np.ndindex(*inputs.shape[2:]):
                at = tuple(
                    p * s + t * d for p, s, t, d in zip(place, window.strides, tap, window.dilations, strict=True)
                )
                into = channel // channels * outputs + out
                full[(slice(None), into, *at)] += kernel[(out, channel, *tap)] * inputs[(slice(None), channel, *place)]
    for axis, (before, after) in enumerate(window.pads, start=2):
        grown = [(0, 0)] * full.ndim
        grown[axis] = (0, max(0, -after))
        full = np.pad(full, grown).take(range(before, full.shape[axis] - after), axis=axis)
    return full


def ordered(weight: Array, use: WeightUse) -> Array:
    assert use.in_axis is not None
    return np.moveaxis(weight, (use.out_axis, use.in_axis), (0, 1))
