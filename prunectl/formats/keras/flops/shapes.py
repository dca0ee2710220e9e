"""Shapes between Keras layers, without the batch axis: the call of a layer, and the outputs of windows and lookups."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prunectl.formats.base import Length, Shape
from prunectl.formats.budgets import MAX_ELEMENTS, MAX_TENSORFLOW_AXES
from prunectl.formats.keras.config import untuple


class UnknownShapeError(Exception):
    """The configuration does not determine a shape."""


def scale_dim(length: Length, factor: int) -> Length:
    """A length times a factor; unknown stays unknown."""
    return None if length is None else length * factor


def validate_shape(shape: Iterable[Length]) -> Shape:
    """The same shape, or UnknownShapeError if no array can have it."""
    checked = tuple(shape)
    if len(checked) > MAX_TENSORFLOW_AXES or any(
        length is not None and not 0 <= length <= MAX_ELEMENTS for length in checked
    ):
        raise UnknownShapeError
    return checked


def broadcast(shapes: Iterable[Shape]) -> Shape:
    """The common shape under broadcasting."""
    unpadded = tuple(shapes)
    rank = max(map(len, unpadded), default=0)
    padded = [(1,) * (rank - len(shape)) + shape for shape in unpadded]
    return tuple(_stretched(lengths) for lengths in zip(*padded, strict=True))


def _stretched(lengths: tuple[Length, ...]) -> Length:
    sizes = {length for length in lengths if length not in {1, None}}
    if sizes:
        return sizes.pop() if len(sizes) == 1 else None
    return None if None in lengths else 1


_AXES = re.compile(r"([123])D")


@dataclass(frozen=True, slots=True)
class LayerCall:
    """A layer with the shapes of its inputs, as far as they are known; settings have their names in Keras 2."""

    kind: str
    config: Mapping[str, Any]
    inputs: tuple[Shape | None, ...]
    keywords: Mapping[str, Shape | None] = field(default_factory=dict)
    """Inputs that are given by name, such as the `value` of an attention."""

    @property
    def all_shapes(self) -> tuple[Shape, ...]:
        """The shapes of all its inputs; UnknownShapeError unless all are known."""
        shapes = (*self.inputs, *self.keywords.values())
        if not shapes or None in shapes:
            raise UnknownShapeError
        return tuple(shape for shape in shapes if shape is not None)

    def shape(self, position: int = 0, keyword: str = "") -> Shape:
        """The shape of an input, given by position or by keyword."""
        shape = self.keywords.get(keyword)
        if shape is None and position < len(self.inputs):
            shape = self.inputs[position]
        if shape is None:
            raise UnknownShapeError
        return shape

    def number(self, key: str, default: int | None = None) -> int:
        """A setting that is an integer."""
        value = self.config.get(key)
        if type(value) is not int:
            value = default
        if value is None or abs(value) > MAX_ELEMENTS:
            raise UnknownShapeError
        return value

    def numbers(self, key: str, count: int, default: int | None = None) -> tuple[int, ...]:
        """A setting that is a number for each axis, or one for all of them."""
        value = untuple(self.config.get(key))
        if isinstance(value, list) and len(value) == count and all(type(number) is int for number in value):
            if all(abs(number) <= MAX_ELEMENTS for number in value):
                return tuple(value)
            raise UnknownShapeError
        if isinstance(value, list):
            if len(value) != 1:
                raise UnknownShapeError
            return (LayerCall(self.kind, {key: value[0]}, ()).number(key, default),) * count
        return (self.number(key, default),) * count

    def word(self, key: str, default: str = "") -> str:
        """A setting that is a string, in lower case."""
        value = self.config.get(key)
        return value.lower() if isinstance(value, str) else default

    def flag(self, key: str) -> bool:
        """Whether a Boolean setting is there and true."""
        return self.config.get(key) is True

    @property
    def is_channels_first(self) -> bool:
        """Whether the channels come before the spatial axes."""
        return self.word("data_format") == "channels_first"

    @property
    def axes(self) -> int:
        """Number of spatial axes of the layer, from the name of its class: 2 for `Conv2D`."""
        match = _AXES.search(self.kind)
        if match is None:
            raise UnknownShapeError
        return int(match[1])

    def image(self, shape: Shape | None = None) -> tuple[Shape, Length]:
        """The spatial lengths and the channels of the input, all unknown (None) if its shape is."""
        image = shape if shape is not None else self.inputs[0] if self.inputs else None
        if image is None:
            return (None,) * self.axes, None
        if len(image) != self.axes + 1:
            raise UnknownShapeError
        return (image[1:], image[0]) if self.is_channels_first else (image[:-1], image[-1])

    def joined(self, space: Shape, channels: Length) -> Shape:
        """The shape of an image with these spatial lengths and channels."""
        return (channels, *space) if self.is_channels_first else (*space, channels)


@dataclass(frozen=True, slots=True)
class Matmul:
    """One matrix product with a weight or, if ``leaf`` is empty, with another input."""

    leaf: str
    """The last part of the weight's name in Keras, such as `kernel` or `query/kernel`."""
    shape: Shape
    """The shape of the weight."""
    times: Shape
    """Lengths of the axes along which the product is repeated."""
    gates: int = 1
    """The number of weights into which Keras 1 splits it."""
    position: int = 0
    """Its number among weights that only differ in their order."""


_PADDINGS = {"same", "causal"}


def convolution(call: LayerCall) -> Shape:
    """The output shape of a convolution."""
    return call.joined(window_output(call, "kernel_size", 1), call.number("filters"))


def depthwise(call: LayerCall) -> Shape:
    """The output shape of a depthwise convolution."""
    return call.joined(
        window_output(call, "kernel_size", 1), scale_dim(call.image()[1], call.number("depth_multiplier", 1))
    )


def pooling(call: LayerCall) -> Shape:
    """The output shape of pooling."""
    return call.joined(window_output(call, "pool_size", None), call.image()[1])


def global_pooling(call: LayerCall) -> Shape:
    """The output shape of global pooling."""
    space, channels = call.image()
    return call.joined((1,) * len(space), channels) if call.flag("keepdims") else (channels,)


def window_output(call: LayerCall, size_key: str, stride: int | None, space: Shape | None = None) -> Shape:
    """The spatial output shape of a sliding window; without a ``stride`` the default is the size (pooling)."""
    space = call.image()[0] if space is None else space
    axes = len(space)
    sizes = call.numbers(size_key, axes, 2 if stride is None else None)
    strides = _strides(call, axes, sizes if stride is None else (stride,) * axes)
    dilations = call.numbers("dilation_rate", axes, 1) if stride is not None else (1,) * axes
    padding = call.word("padding", "valid")
    return tuple(
        _window_length(*facts, padding=padding) for facts in zip(space, sizes, strides, dilations, strict=True)
    )


def transposed_convolution(call: LayerCall) -> Shape:
    """The output shape of a transposed convolution."""
    space, _ = call.image()
    axes = len(space)
    sizes = call.numbers("kernel_size", axes)
    strides = _strides(call, axes, (1,) * axes)
    dilations = call.numbers("dilation_rate", axes, 1)
    extra = call.numbers("output_padding", axes) if call.config.get("output_padding") is not None else None
    is_same = call.word("padding", "valid") == "same"
    lengths: list[Length] = []
    for axis, length in enumerate(space):
        size = (sizes[axis] - 1) * dilations[axis] + 1
        if length is None:
            lengths.append(None)
        elif extra is None:
            lengths.append(length * strides[axis] + (0 if is_same else max(size - strides[axis], 0)))
        else:
            lengths.append((length - 1) * strides[axis] + size - (2 * (size // 2) if is_same else 0) + extra[axis])
    return call.joined(tuple(lengths), call.number("filters"))


def upsampling(call: LayerCall) -> Shape:
    """The shape of an upsampled image."""
    space, channels = call.image()
    sizes = call.numbers("size", len(space), 2)
    return call.joined(tuple(scale_dim(length, size) for length, size in zip(space, sizes, strict=True)), channels)


def resizing(call: LayerCall) -> Shape:
    """The shape of an image resized to a fixed size."""
    shape = call.shape()
    if len(shape) != 3:
        raise UnknownShapeError
    channels = shape[0] if call.is_channels_first else shape[-1]
    return call.joined((call.number("height"), call.number("width")), channels)


def _strides(call: LayerCall, axes: int, default: tuple[int, ...]) -> tuple[int, ...]:
    strides = default if untuple(call.config.get("strides")) is None else call.numbers("strides", axes)
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


def _with_borders(call: LayerCall, key: str, sign: int) -> Shape:
    space, channels = call.image()
    borders = _borders(untuple(call.config.get(key)), len(space))
    lengths = tuple(
        None if length is None else length + sign * border for length, border in zip(space, borders, strict=True)
    )
    if any(length is not None and length < 1 for length in lengths):
        raise UnknownShapeError
    return call.joined(lengths, channels)


def _borders(setting: object, axes: int) -> tuple[int, ...]:
    """The border of each axis, both sides together."""
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


def text_vectorization(call: LayerCall) -> Shape:
    """The tokens of a text."""
    is_cut_into_words = call.config.get("split", "whitespace") is not None
    if call.flag("ragged") or not is_cut_into_words or call.word("output_mode", "int") != "int":
        raise UnknownShapeError
    length = call.config.get("output_sequence_length")
    return (None if length is None else call.number("output_sequence_length"),)


def _encoded(size: Callable[[LayerCall], int], mode: str = "int") -> Callable[[LayerCall], Shape]:
    """The rule for integers (the output has the shape of the input) or encodings of this size, with a default mode."""

    def rule(call: LayerCall) -> Shape:
        shape, output_mode = call.shape(), call.word("output_mode", mode)
        if output_mode == "int":
            return shape
        if not shape or call.flag("sparse"):
            raise UnknownShapeError
        return (*(shape if output_mode == "one_hot" and shape[-1] != 1 else shape[:-1]), size(call))

    return rule


def _vocabulary_size(call: LayerCall) -> int:
    return call.number("max_tokens" if call.flag("pad_to_max_tokens") else "vocabulary_size")


def _number_of_bins(call: LayerCall) -> int:
    boundaries = untuple(call.config.get("bin_boundaries"))
    return len(boundaries) + 1 if isinstance(boundaries, list) else call.number("num_bins")


LOOKUP_RULES: dict[str, Callable[[LayerCall], Shape]] = {
    "TextVectorization": text_vectorization,
    **dict.fromkeys(("StringLookup", "IntegerLookup"), _encoded(_vocabulary_size)),
    **dict.fromkeys(("Discretization", "Hashing"), _encoded(_number_of_bins)),
    "CategoryEncoding": _encoded(lambda call: call.number("num_tokens"), "multi_hot"),
}
WINDOW_RULES: dict[str, Callable[[LayerCall], Shape]] = {
    **dict.fromkeys(("Conv1D", "Conv2D", "Conv3D", "SeparableConv1D", "SeparableConv2D"), convolution),
    **dict.fromkeys(("DepthwiseConv1D", "DepthwiseConv2D"), depthwise),
    **dict.fromkeys(("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"), transposed_convolution),
    **dict.fromkeys(("LocallyConnected1D", "LocallyConnected2D"), convolution),
    **{f"{kind}Pooling{axes}D": pooling for kind in ("Max", "Average") for axes in (1, 2, 3)},
    **{f"Global{kind}Pooling{axes}D": global_pooling for kind in ("Max", "Average") for axes in (1, 2, 3)},
    **{f"ZeroPadding{axes}D": lambda call: _with_borders(call, "padding", 1) for axes in (1, 2, 3)},
    **{f"Cropping{axes}D": lambda call: _with_borders(call, "cropping", -1) for axes in (1, 2, 3)},
    **{f"UpSampling{axes}D": upsampling for axes in (1, 2, 3)},
    **dict.fromkeys(("Resizing", "CenterCrop", "RandomCrop"), resizing),
}
