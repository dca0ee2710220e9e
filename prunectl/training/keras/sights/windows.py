"""What the kernels of convolutions meet, and how they move over it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from prunectl.training.keras import numbers
from prunectl.training.keras.sights.apart import convolved_apart
from prunectl.training.keras.sights.meeting import Call, Meeting
from prunectl.training.network import Array
from prunectl.training.sights import Use, Window

Pads = tuple[int, int]


def convolution(call: Call) -> Iterator[Meeting]:
    """A kernel (..., in, out)."""
    layer, x = call.layer, _channels_first(call)
    use = Use(
        out_axis=layer.rank + 1,
        in_axis=layer.rank,
        groups=int(getattr(layer, "groups", 1)),
        window=_window(layer, x.shape[2:]),
    )
    yield Meeting(layer.kernel, x, use)


def depthwise(call: Call) -> Iterator[Meeting]:
    """A kernel (..., channels, multiplier)."""
    layer, x = call.layer, _channels_first(call)
    yield Meeting(_depthwise_kernel(layer), x, _depthwise_use(layer, x))


def separable(call: Call) -> Iterator[Meeting]:
    """A depthwise kernel, then one that mixes the channels at each place."""
    layer, x = call.layer, _channels_first(call)
    use = _depthwise_use(layer, x)
    yield Meeting(layer.depthwise_kernel, x, use)
    kernel = numbers.read(call.library, layer.depthwise_kernel).astype(np.float32)
    assert use.window is not None
    one = (1,) * layer.rank
    window = Window(one, one, ((0, 0),) * layer.rank)
    yield Meeting(
        layer.pointwise_kernel,
        convolved_apart(x, kernel, use.window),
        Use(out_axis=layer.rank + 1, in_axis=layer.rank, window=window),
    )


def transposed(call: Call) -> Iterator[Meeting]:
    """A kernel (..., out, in)."""
    layer, x = call.layer, _channels_first(call)
    made = call.out_shape[-layer.rank - 1 : -1] if _is_channels_last(layer) else call.out_shape[-layer.rank :]
    sizes = zip(x.shape[2:], made, _reach(layer), layer.strides, strict=True)
    window = Window(
        tuple(layer.strides),
        tuple(layer.dilation_rate),
        tuple(_cut(layer.padding, *each) for each in sizes),
        is_transposed=True,
    )
    yield Meeting(layer.kernel, x, Use(out_axis=layer.rank, in_axis=layer.rank + 1, window=window))


def _is_channels_last(layer: Any) -> bool:
    return bool(layer.data_format == "channels_last")


def _channels_first(call: Call) -> Array:
    """Return inputs as (examples, channels, space)."""
    layer, x = call.layer, call.inputs[0]
    # Keras 2 takes several axes of examples.
    x = x.reshape(-1, *x.shape[-layer.rank - 1 :])
    return np.moveaxis(x, -1, 1) if _is_channels_last(layer) else x


def _depthwise_kernel(layer: Any) -> Any:
    """Keras 2 has another word for it."""
    return layer.depthwise_kernel if hasattr(layer, "depthwise_kernel") else layer.kernel


def _depthwise_use(layer: Any, x: Array) -> Use:
    return Use(
        out_axis=layer.rank + 1,
        in_axis=None,
        groups=x.shape[1],
        group_axis=layer.rank,
        window=_window(layer, x.shape[2:]),
    )


def _window(layer: Any, space: tuple[int, ...]) -> Window:
    sizes = zip(space, _reach(layer), layer.strides, strict=True)
    return Window(
        tuple(layer.strides), tuple(layer.dilation_rate), tuple(_around(layer.padding, *each) for each in sizes)
    )


def _reach(layer: Any) -> tuple[int, ...]:
    """Return how far a kernel reaches along each axis of space."""
    return tuple(
        (size - 1) * dilation + 1 for size, dilation in zip(layer.kernel_size, layer.dilation_rate, strict=True)
    )


def _around(padding: str, length: int, reach: int, stride: int) -> Pads:
    """Return the zeros before and after; as TensorFlow has it, which all backends follow, the odd one comes after."""
    if padding == "causal":
        return reach - 1, 0
    if padding == "valid":
        return 0, 0
    total = max((-(-length // stride) - 1) * stride + reach - length, 0)
    return total // 2, total - total // 2


def _cut(padding: str, length: int, made: int, reach: int, stride: int) -> Pads:
    """Return what of the full result is cut off before and after, below zero where zeros are added."""
    full = (length - 1) * stride + reach
    before = max(full - made, 0) // 2 if padding == "same" else 0
    return before, full - made - before
