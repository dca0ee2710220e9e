"""What comes out of weights and what they are shown to meet, number by number, and models to look at."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.training.backend import LayerInput, SlidingWindow, WeightUse
from prunectl.training.data.source import as_tuple
from tests.contract import Array
from tests.training.keras import nets

TOLERANCE = 1e-5


def groups_of(weight: Array, use: WeightUse) -> Iterator[Array]:
    """The part of each group, (out, in, *window)."""
    weight = np.moveaxis(weight, use.out_axis, 0)
    group_axis, in_axis = (
        None if axis is None else axis + (axis < use.out_axis) for axis in (use.group_axis, use.in_axis)
    )
    if group_axis is not None:
        parts = list(np.moveaxis(weight, group_axis, 0))
        in_axis = None if in_axis is None else in_axis - (in_axis > group_axis)
    else:
        parts = np.split(weight, use.groups)
    for part in parts:
        yield np.moveaxis(part, in_axis, 1) if in_axis is not None else part[:, np.newaxis]


def multiplied(sight: LayerInput, weight: Array) -> Array:
    """A product, group by group."""
    weight = weight if sight.use.shape is None else weight.reshape(sight.use.shape)
    runs = np.split(sight.inputs, sight.use.groups, axis=-1)
    made = [run @ part.T for run, part in zip(runs, groups_of(weight, sight.use), strict=True)]
    found = np.concatenate(made, axis=-1)
    return found[..., slice(*sight.use.outputs)] if sight.use.outputs else found


def slid(sight: LayerInput, weight: Array) -> Array:
    """A convolution, one number at a time."""
    use = sight.use
    runs = np.split(sight.inputs, use.groups, axis=1)
    assert use.window is not None
    one = spread if use.window.is_transposed else moved
    made = [one(run, part, use.window) for run, part in zip(runs, groups_of(weight, use), strict=True)]
    return np.concatenate(made, axis=1)


def moved(x: Array, kernel: Array, window: SlidingWindow) -> Array:
    x = np.pad(x, ((0, 0), (0, 0), *window.pads))
    sizes = kernel.shape[2:]
    made = [
        len(range(0, length - (size - 1) * dilation, stride))
        for length, size, dilation, stride in zip(x.shape[2:], sizes, window.dilations, window.strides, strict=True)
    ]
    found = np.zeros((len(x), len(kernel), *made))
    for to in product(*map(range, made)):
        for at in product(*map(range, sizes)):
            place = tuple(t * s + a * d for t, s, a, d in zip(to, window.strides, at, window.dilations, strict=True))
            found[(..., *to)] += x[(..., *place)] @ kernel[(..., *at)].T
    return found


def spread(x: Array, kernel: Array, window: SlidingWindow) -> Array:
    sizes = kernel.shape[2:]
    full = [
        (length - 1) * stride + (size - 1) * dilation + 1
        for length, size, dilation, stride in zip(x.shape[2:], sizes, window.dilations, window.strides, strict=True)
    ]
    found = np.zeros((len(x), len(kernel), *full))
    for of in product(*map(range, x.shape[2:])):
        for at in product(*map(range, sizes)):
            place = tuple(o * s + a * d for o, s, a, d in zip(of, window.strides, at, window.dilations, strict=True))
            found[(..., *place)] += x[(..., *of)] @ kernel[(..., *at)].T
    added = [(max(-before, 0), max(-after, 0)) for before, after in window.pads]
    kept = [
        slice(max(before, 0), size - max(after, 0)) for (before, after), size in zip(window.pads, full, strict=True)
    ]
    return np.pad(found[(..., *kept)], ((0, 0), (0, 0), *added))


def linear(sight: LayerInput, weight: Array) -> Array:
    return multiplied(sight, weight) if sight.use.window is None else slid(sight, weight)


def looked_at(path: Path, x: Any) -> tuple[list[LayerInput], dict[str, Array]]:
    network = nets.opened(path)
    weights = network.tensors()
    before, found = network.predict(x), list[LayerInput]()
    network.observe(
        list(weights), x, lambda sight: found.append(LayerInput(sight.name, sight.inputs.copy(), sight.use))
    )
    for name, value in network.tensors().items():
        np.testing.assert_array_equal(value, weights[name])
    for old, new in zip(as_tuple(before), as_tuple(network.predict(x)), strict=True):
        np.testing.assert_array_equal(old, new)
    assert all(sight.inputs.dtype == np.float32 for sight in found)
    return found, weights


def numbers(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def alone(k: Any, layer: Any, shape: tuple[int, ...], path: Path) -> Any:
    """A model of one layer, saved."""
    model = k.Sequential([k.layers.Input(shape), layer])
    nets.saved(model, path)
    return model
