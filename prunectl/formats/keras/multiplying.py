"""What Keras layers multiply, by class."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prunectl.formats.keras import attention, recurrent
from prunectl.formats.keras.products import Product
from prunectl.formats.keras.shapes import UnknownShapeError, scaled
from prunectl.formats.keras.step import Step
from prunectl.formats.keras.windows import WINDOW_RULES
from prunectl.formats.lengths import Shape, product


def products(step: Step) -> tuple[Product, ...]:
    """Return what a layer multiplies; raise UnknownShapeError if that is not known."""
    return tuple(_MULTIPLYING[step.kind](step))


def is_multiplying(kind: str) -> bool:
    """Whether layers of this class multiply at all."""
    return kind in _MULTIPLYING


def _dense(step: Step) -> Iterator[Product]:
    shape = step.shape()
    if not shape:
        raise UnknownShapeError
    yield Product("kernel", (shape[-1], step.number("units")), shape[:-1])


def _convolution(step: Step) -> Iterator[Product]:
    _, channels = step.image()
    kernel, groups = step.numbers("kernel_size", step.axes), step.number("groups", 1)
    if groups < 1:
        raise UnknownShapeError
    inner = None if channels is None else channels // groups
    yield Product("kernel", (*kernel, inner, step.number("filters")), _space(step))


def _transposed(step: Step) -> Iterator[Product]:
    space, channels = step.image()
    yield Product("kernel", (*step.numbers("kernel_size", step.axes), step.number("filters"), channels), space)


def _depthwise(step: Step) -> Iterator[Product]:
    _, channels = step.image()
    shape = (*step.numbers("kernel_size", step.axes), channels, step.number("depth_multiplier", 1))
    yield Product("depthwise_kernel", shape, _space(step))


def _separable(step: Step) -> Iterator[Product]:
    yield from _depthwise(step)
    wide = scaled(step.image()[1], step.number("depth_multiplier", 1))
    yield Product("pointwise_kernel", (*(1,) * step.axes, wide, step.number("filters")), _space(step))


def _locally_connected(step: Step) -> Iterator[Product]:
    _, channels = step.image()
    window = product((*step.numbers("kernel_size", step.axes), channels))
    yield Product("kernel", (product(_space(step)), window, step.number("filters")), ())


def _space(step: Step) -> Shape:
    return step.image(WINDOW_RULES[step.kind](step))[0]


_MULTIPLYING: dict[str, Callable[[Step], Iterator[Product]]] = {
    "Dense": _dense,
    **dict.fromkeys(("Conv1D", "Conv2D", "Conv3D"), _convolution),
    **dict.fromkeys(("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"), _transposed),
    **dict.fromkeys(("DepthwiseConv1D", "DepthwiseConv2D"), _depthwise),
    **dict.fromkeys(("SeparableConv1D", "SeparableConv2D"), _separable),
    **dict.fromkeys(("LocallyConnected1D", "LocallyConnected2D"), _locally_connected),
    **dict.fromkeys(recurrent.GATES, recurrent.products),
    "RNN": recurrent.products_of_cells,
    **dict.fromkeys(("ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D"), recurrent.products_of_images),
    "MultiHeadAttention": attention.projected,
    "GroupQueryAttention": attention.grouped,
    "Attention": attention.compared,
    "AdditiveAttention": attention.compared,
    "Dot": attention.dotted,
    "EinsumDense": attention.summed,
}
