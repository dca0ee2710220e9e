"""Shapes of what operations of ONNX cut, join, stretch and put in another order."""

from __future__ import annotations

import math

from prunectl.formats.onnx.step import Shape, Step, UnknownShapeError, broadcast, signed, wrapped


def flattened(step: Step) -> Shape:
    """Return what Flatten makes: two axes."""
    shape = step.shape(0)
    axis = signed(step.node.number("axis", 1))
    axis = axis + len(shape) if axis < 0 else axis
    return math.prod(shape[:axis]), math.prod(shape[axis:])


def reshaped(step: Step) -> Shape:
    """Return what Reshape makes: 0 keeps a length, -1 takes the rest."""
    old, asked = step.shape(0), step.setting("shape", 1)
    if any(length == 0 and place >= len(old) for place, length in enumerate(asked)):
        raise UnknownShapeError
    new = [old[place] if length == 0 else length for place, length in enumerate(asked)]
    if -1 in new:
        known = math.prod(length for length in new if length != -1)
        if not known or math.prod(old) % known:
            raise UnknownShapeError
        new[new.index(-1)] = math.prod(old) // known
    return tuple(new)


def transposed(step: Step) -> Shape:
    """Return the axes in another order."""
    shape = step.shape(0)
    order = step.lists(step.node, "perm") or tuple(reversed(range(len(shape))))
    if sorted(order) != list(range(len(shape))):
        raise UnknownShapeError
    return tuple(shape[axis] for axis in order)


def concatenated(step: Step) -> Shape:
    """Return the lengths added along one axis."""
    shapes = [step.shape(place) for place in range(len(step.inputs))]
    first = shapes[0]
    axis = step.axis(len(first))
    if any(len(shape) != len(first) for shape in shapes):
        raise UnknownShapeError
    return (*first[:axis], sum(shape[axis] for shape in shapes), *first[axis + 1 :])


def squeezed(step: Step) -> Shape:
    """Return the axes of length one dropped."""
    shape = step.shape(0)
    ones = tuple(axis for axis, length in enumerate(shape) if length == 1)
    gone = {wrapped(axis, len(shape)) for axis in step.setting("axes", 1, ones)}
    return tuple(length for axis, length in enumerate(shape) if axis not in gone)


def unsqueezed(step: Step) -> Shape:
    """Return axes of length one added."""
    shape, axes = step.shape(0), step.setting("axes", 1)
    rank = len(shape) + len(axes)
    new = {wrapped(axis, rank) for axis in axes}
    rest = iter(shape)
    if len(new) != len(axes):
        raise UnknownShapeError
    return tuple(1 if axis in new else next(rest) for axis in range(rank))


def gathered(step: Step) -> Shape:
    """Return the shape of what indices pick along one axis."""
    shape = step.shape(0)
    axis = step.axis(len(shape))
    return (*shape[:axis], *step.shape(1), *shape[axis + 1 :])


def sliced(step: Step) -> Shape:
    """Return the lengths of what is cut out."""
    shape = list(step.shape(0))
    starts, ends = step.setting("starts", 1), step.setting("ends", 2)
    axes = step.setting("axes", 3, tuple(range(len(starts))))
    steps = step.setting("steps", 4, (1,) * len(starts))
    for start, end, axis, stride in zip(starts, ends, axes, steps, strict=False):
        at = wrapped(axis, len(shape))
        if stride == 0:
            raise UnknownShapeError
        shape[at] = len(range(*slice(start, end, stride).indices(shape[at])))
    return tuple(shape)


def padded(step: Step) -> Shape:
    """Return the lengths with what is put around."""
    shape, pads = step.shape(0), step.setting("pads", 1)
    if len(pads) != 2 * len(shape) or (len(step.inputs) > 3 and step.node.inputs[3]):
        raise UnknownShapeError
    return tuple(length + pads[axis] + pads[axis + len(shape)] for axis, length in enumerate(shape))


def expanded(step: Step) -> Shape:
    """Return the shape that an array is stretched to."""
    return broadcast(step.shape(0), step.numbers(1))


def tiled(step: Step) -> Shape:
    """Return the lengths repeated."""
    return tuple(length * times for length, times in zip(step.shape(0), step.numbers(1), strict=True))


def depth_to_space(step: Step) -> Shape:
    """Return channels spread over the image."""
    batch, channels, *image = step.shape(0)
    block = step.node.number("blocksize", 1)
    return (batch, channels // block**2, *(length * block for length in image))


def space_to_depth(step: Step) -> Shape:
    """Return blocks of the image gathered into channels."""
    batch, channels, *image = step.shape(0)
    block = step.node.number("blocksize", 1)
    return (batch, channels * block**2, *(length // block for length in image))


def resized(step: Step) -> Shape:
    """Return the lengths asked for, or multiplied by whole scales."""
    if len(step.node.inputs) > 3 and step.node.inputs[3]:
        return step.numbers(3)
    scales = step.numbers(2 if len(step.node.inputs) > 2 else 1)
    return tuple(length * scale for length, scale in zip(step.shape(0), scales, strict=True))
