"""Output shapes of operations that slide a window: convolutions and pools."""

from __future__ import annotations

from prunectl.formats.onnx.step import Shape, Step, UnknownShapeError


def convolved(step: Step, weight_at: int = 1) -> Shape:
    """Return the output shape of a convolution."""
    image, weight = step.shape(0), step.shape(weight_at)
    if len(image) != len(weight) or len(image) < 3:
        raise UnknownShapeError
    return (image[0], weight[0], *_slid(step, image[2:], weight[2:]))


def pooled(step: Step) -> Shape:
    """Return the output shape of a pool."""
    image = step.shape(0)
    window = step.lists(step.node, "kernel_shape")
    if window is None or len(window) != len(image) - 2:
        raise UnknownShapeError
    return (*image[:2], *_slid(step, image[2:], window))


def pooled_whole(step: Step) -> Shape:
    """Return the output shape of a pool over the whole image."""
    image = step.shape(0)
    return (*image[:2], *(1 for _ in image[2:]))


def deconvolved(step: Step) -> Shape:
    """Return the output shape of a transposed convolution."""
    image, weight = step.shape(0), step.shape(1)
    if len(image) != len(weight) or len(image) < 3:
        raise UnknownShapeError
    axes = len(image) - 2
    channels = weight[1] * step.node.number("group", 1)
    asked = step.lists(step.node, "output_shape")
    if asked is not None:
        return (image[0], channels, *asked[-axes:])
    strides, dilations, pads = _window(step, axes)
    extra = _list(step, "output_padding", axes, 0)
    is_same = _padding(step).startswith("SAME")
    return (
        image[0],
        channels,
        *(
            length * stride
            if is_same
            else stride * (length - 1) + add + (size - 1) * dilation + 1 - pads[axis] - pads[axis + axes]
            for axis, (length, size, stride, dilation, add) in enumerate(
                zip(image[2:], weight[2:], strides, dilations, extra, strict=True)
            )
        ),
    )


def _slid(step: Step, image: Shape, window: Shape) -> Shape:
    axes = len(image)
    strides, dilations, pads = _window(step, axes)
    padding, is_up = _padding(step), bool(step.node.number("ceil_mode", 0))
    found = []
    for axis, (length, size, stride, dilation) in enumerate(zip(image, window, strides, dilations, strict=True)):
        if padding.startswith("SAME"):
            found.append(-(-length // stride))
            continue
        room = length + pads[axis] + pads[axis + axes] - ((size - 1) * dilation + 1)
        found.append((-(-room // stride) if is_up else room // stride) + 1)
    return tuple(found)


def _window(step: Step, axes: int) -> tuple[Shape, Shape, Shape]:
    strides, dilations = _list(step, "strides", axes, 1), _list(step, "dilations", axes, 1)
    if min(strides) < 1 or min(dilations) < 1:
        raise UnknownShapeError
    return strides, dilations, _list(step, "pads", 2 * axes, 0)


def _list(step: Step, name: str, length: int, default: int) -> Shape:
    found = step.lists(step.node, name) or (default,) * length
    if len(found) != length:
        raise UnknownShapeError
    return found


def _padding(step: Step) -> str:
    attribute = step.node.attributes.get("auto_pad")
    return attribute.text if attribute is not None else ""
