"""im2col: any layer as a matrix product, with weights as rows and input patches as columns, in every layout."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from prunectl.formats.base import Array
from prunectl.training.backend import SlidingWindow, WeightUse

_CHUNK_BYTES = 32 << 20


def weight_matrix(weights: Array, use: WeightUse) -> Array:
    """Weights as groups by outputs by features; the input channels of a window position are adjacent features."""
    front = _channels_first(np.ascontiguousarray(weights), use)
    if use.outputs is not None:
        front = front[:, slice(*use.outputs)]
    groups, outputs = front.shape[:2]
    # From groups, outputs, channels, window: channels last, since N:M groups run along the input channels.
    return np.moveaxis(front, 2, -1).reshape(groups, outputs, -1)


def scatter_rows(rows: Array, use: WeightUse, weights: Array) -> Array:
    """A copy of the weights with the rows of a use's outputs replaced: the inverse of `weight_matrix`."""
    result = np.array(weights, dtype=rows.dtype)
    front = _channels_first(result, use)
    part = front[:, slice(*use.outputs)] if use.outputs is not None else front
    window = part.shape[3:]
    part[...] = np.moveaxis(rows.reshape(*part.shape[:2], *window, part.shape[2]), -1, 2)
    return result


def _channels_first(weights: Array, use: WeightUse) -> Array:
    """A view of the weights with the axes groups, outputs, channels, then the window."""
    if use.shape is not None:
        weights = weights.reshape(use.shape, copy=False)
    if use.group_axis is not None and use.in_axis is not None:
        return np.moveaxis(weights, (use.group_axis, use.out_axis, use.in_axis), (0, 1, 2))
    if use.group_axis is not None:
        return np.expand_dims(np.moveaxis(weights, (use.group_axis, use.out_axis), (0, 1)), 2)
    assert use.in_axis is not None
    moved = np.moveaxis(weights, (use.out_axis, use.in_axis), (0, 1))
    outputs, inputs, *window = moved.shape
    if use.window is not None and use.window.is_transposed:
        split = moved.reshape((outputs, use.groups, inputs // use.groups, *window), copy=False)
        return np.moveaxis(split, 1, 0)
    return moved.reshape((use.groups, outputs // use.groups, inputs, *window), copy=False)


def im2col(inputs: Array, use: WeightUse, kernel: tuple[int, ...]) -> Iterator[Array]:
    """Yield input patches as positions by groups by features, in chunks."""
    if use.window is None:
        flat = inputs.reshape(-1, use.groups, inputs.shape[-1] // use.groups)
        step = max(_CHUNK_BYTES // max(inputs.shape[-1] * flat.itemsize, 1), 1)
        yield from (flat[begin : begin + step] for begin in range(0, len(flat), step))
        return
    window = use.window
    shape = kernel_shape(kernel, use)
    positions = math.prod(inputs.shape[2:])
    step = max(_CHUNK_BYTES // max(positions * inputs.shape[1] * math.prod(shape) * inputs.itemsize, 1), 1)
    for begin in range(0, len(inputs), step):
        yield _split_groups(_sliding_windows(inputs[begin : begin + step], window, shape), use.groups)


def im2col_by_group(inputs: Array, use: WeightUse, kernel: tuple[int, ...], outputs: int) -> Iterator[Array]:
    """Yield input patches as groups by positions by features, in chunks whose outputs stay small."""
    step = max(_CHUNK_BYTES // max(4 * outputs, 1), 1)
    for columns in im2col(inputs, use, kernel):
        for begin in range(0, len(columns), step):
            yield np.ascontiguousarray(columns[begin : begin + step].transpose(1, 0, 2), np.float32)


def kernel_shape(kernel: tuple[int, ...], use: WeightUse) -> tuple[int, ...]:
    """The size of the window along each spatial axis."""
    channel_axes = {axis for axis in (use.out_axis, use.in_axis, use.group_axis) if axis is not None}
    return tuple(size for axis, size in enumerate(kernel) if axis not in channel_axes)


def _sliding_windows(inputs: Array, window: SlidingWindow, shape: tuple[int, ...]) -> Array:
    """Sliding windows as examples by positions by window by channels."""
    rank = len(shape)
    space = tuple(range(2, 2 + rank))
    reach = tuple(step * (size - 1) for step, size in zip(window.dilations, shape, strict=True))
    pads, strides = list(window.pads), window.strides
    if window.is_transposed:
        inputs, strides = _with_strides(inputs, window.strides), (1,) * rank
        pads = [(far - before, far - after) for far, (before, after) in zip(reach, window.pads, strict=True)]
    inputs = _padded(inputs, pads)
    windows: Array = sliding_window_view(inputs, [far + 1 for far in reach], axis=space)
    every: list[Any] = [slice(None)] * 2
    taps = [slice(None, None, step) for step in window.dilations]
    windows = windows[tuple(every + [slice(None, None, step) for step in strides] + taps)]
    if window.is_transposed:
        windows = np.flip(windows, axis=tuple(range(2 + rank, 2 + 2 * rank)))
    return np.moveaxis(windows, 1, -1)


def _with_strides(inputs: Array, strides: tuple[int, ...]) -> Array:
    """Inputs with zeros inserted between them, over which a transposed convolution slides with stride 1."""
    shape = [(size - 1) * step + 1 for size, step in zip(inputs.shape[2:], strides, strict=True)]
    spread = np.zeros((*inputs.shape[:2], *shape), inputs.dtype)
    spread[(slice(None), slice(None), *(slice(None, None, step) for step in strides))] = inputs
    return spread


def _padded(inputs: Array, pads: list[tuple[int, int]]) -> Array:
    """Inputs padded with zeros; a negative padding crops instead."""
    added = [(max(before, 0), max(after, 0)) for before, after in pads]
    padded = np.pad(inputs, [(0, 0), (0, 0), *added]) if any(map(any, added)) else inputs
    cut = tuple(slice(max(-before, 0), -max(-after, 0) or None) for before, after in pads)
    return padded[(slice(None), slice(None), *cut)]


def _split_groups(columns: Array, groups: int) -> Array:
    """Channels-last windows as positions by groups by features."""
    channels = columns.shape[-1] // groups
    split = columns.reshape(*columns.shape[:-1], groups, channels)
    rank = (split.ndim - 3) // 2
    # Examples and positions first, then groups, the window, channels.
    moved = np.moveaxis(split, -2, 1 + rank)
    return moved.reshape(-1, groups, math.prod(moved.shape[2 + rank :]))
