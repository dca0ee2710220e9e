"""Output shapes of convolution, pooling, padding, cropping and upsampling."""

from __future__ import annotations

from collections.abc import Callable

from prunectl.formats.base import Length, Shape
from prunectl.formats.keras.flops.shapes import LayerCall, UnknownShapeError, scale_dim, untuple

_PADDINGS = {"same", "causal"}


def convolution(step: LayerCall) -> Shape:
    """The output shape of a convolution."""
    return step.joined(window_output(step, "kernel_size", 1), step.number("filters"))


def depthwise(step: LayerCall) -> Shape:
    """The output shape of a depthwise convolution."""
    return step.joined(
        window_output(step, "kernel_size", 1), scale_dim(step.image()[1], step.number("depth_multiplier", 1))
    )


def pooling(step: LayerCall) -> Shape:
    """The output shape of pooling."""
    return step.joined(window_output(step, "pool_size", None), step.image()[1])


def global_pooling(step: LayerCall) -> Shape:
    """The output shape of global pooling."""
    space, channels = step.image()
    return step.joined((1,) * len(space), channels) if step.flag("keepdims") else (channels,)


def window_output(step: LayerCall, size_key: str, stride: int | None, space: Shape | None = None) -> Shape:
    """The spatial shape behind a sliding window; pooling strides by its own size by default."""
    space = step.image()[0] if space is None else space
    axes = len(space)
    sizes = step.numbers(size_key, axes, 2 if stride is None else None)
    strides = _strides(step, axes, sizes if stride is None else (stride,) * axes)
    dilations = step.numbers("dilation_rate", axes, 1) if stride is not None else (1,) * axes
    padding = step.word("padding", "valid")
    return tuple(
        _window_length(*facts, padding=padding) for facts in zip(space, sizes, strides, dilations, strict=True)
    )


def transposed_convolution(step: LayerCall) -> Shape:
    """The output shape of a transposed convolution."""
    space, _ = step.image()
    axes = len(space)
    sizes = step.numbers("kernel_size", axes)
    strides = _strides(step, axes, (1,) * axes)
    dilations = step.numbers("dilation_rate", axes, 1)
    extra = step.numbers("output_padding", axes) if step.config.get("output_padding") is not None else None
    is_same = step.word("padding", "valid") == "same"
    lengths: list[Length] = []
    for axis, length in enumerate(space):
        size = (sizes[axis] - 1) * dilations[axis] + 1
        if length is None:
            lengths.append(None)
        elif extra is None:
            lengths.append(length * strides[axis] + (0 if is_same else max(size - strides[axis], 0)))
        else:
            lengths.append((length - 1) * strides[axis] + size - (2 * (size // 2) if is_same else 0) + extra[axis])
    return step.joined(tuple(lengths), step.number("filters"))


def padding_output(step: LayerCall) -> Shape:
    """The shape of an image with a border around it."""
    return _with_borders(step, "padding", 1)


def cropping_output(step: LayerCall) -> Shape:
    """The shape of an image without its border."""
    return _with_borders(step, "cropping", -1)


def upsampling(step: LayerCall) -> Shape:
    """The shape of an upsampled image."""
    space, channels = step.image()
    sizes = step.numbers("size", len(space), 2)
    return step.joined(tuple(scale_dim(length, size) for length, size in zip(space, sizes, strict=True)), channels)


def resizing(step: LayerCall) -> Shape:
    """The shape of an image resized to a fixed size."""
    shape = step.shape()
    if len(shape) != 3:
        raise UnknownShapeError
    channels = shape[0] if step.is_channels_first else shape[-1]
    return step.joined((step.number("height"), step.number("width")), channels)


def _strides(step: LayerCall, axes: int, default: tuple[int, ...]) -> tuple[int, ...]:
    strides = default if untuple(step.config.get("strides")) is None else step.numbers("strides", axes)
    if min(strides) < 1:
        raise UnknownShapeError
    return strides


def _window_length(length: Length, size: int, stride: int, dilation: int, *, padding: str) -> Length:
    if length is None:
        return None
    if padding in _PADDINGS:
        return -(-length // stride)
    room = length - ((size - 1) * dilation + 1)
    if padding != "valid" or room < 0 or size < 1 or dilation < 1:
        raise UnknownShapeError
    return room // stride + 1


def _with_borders(step: LayerCall, key: str, sign: int) -> Shape:
    space, channels = step.image()
    borders = _borders(untuple(step.config.get(key)), len(space))
    lengths = tuple(
        None if length is None else length + sign * border for length, border in zip(space, borders, strict=True)
    )
    return step.joined(lengths, channels)


def _borders(setting: object, axes: int) -> tuple[int, ...]:
    """How much both sides of each axis have together."""
    if type(setting) is int:
        return (2 * setting,) * axes
    sides = [untuple(number) for number in setting] if isinstance(setting, list) else []
    if axes == 1 and len(sides) == 2:
        sides = [sides]
    if len(sides) != axes:
        raise UnknownShapeError
    totals = []
    for side in sides:
        both = [side, side] if type(side) is int else side
        if not isinstance(both, list) or len(both) != 2 or not all(type(number) is int for number in both):
            raise UnknownShapeError
        totals.append(sum(both))
    return tuple(totals)


WINDOW_RULES: dict[str, Callable[[LayerCall], Shape]] = {
    **dict.fromkeys(("Conv1D", "Conv2D", "Conv3D", "SeparableConv1D", "SeparableConv2D"), convolution),
    **dict.fromkeys(("DepthwiseConv1D", "DepthwiseConv2D"), depthwise),
    **dict.fromkeys(("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"), transposed_convolution),
    **dict.fromkeys(("LocallyConnected1D", "LocallyConnected2D"), convolution),
    **{f"{kind}Pooling{axes}D": pooling for kind in ("Max", "Average") for axes in (1, 2, 3)},
    **{f"Global{kind}Pooling{axes}D": global_pooling for kind in ("Max", "Average") for axes in (1, 2, 3)},
    **{f"ZeroPadding{axes}D": padding_output for axes in (1, 2, 3)},
    **{f"Cropping{axes}D": cropping_output for axes in (1, 2, 3)},
    **{f"UpSampling{axes}D": upsampling for axes in (1, 2, 3)},
    **dict.fromkeys(("Resizing", "CenterCrop", "RandomCrop"), resizing),
}
