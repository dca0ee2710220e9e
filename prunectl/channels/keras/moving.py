"""Keras layers that move numbers about, slide windows over space, or put values together."""

from __future__ import annotations

from prunectl.channels.graph import Kind
from prunectl.channels.keras.called import Called, whole
from prunectl.formats.keras.shapes import UnknownShapeError, plain


def spatial(call: Called) -> str:
    """Pools, borders and sizes: axes of space change, or go."""
    shape, made = call.shape(call.data), call.made()
    first = 2 if call.step.is_channels_first else 1
    return call.does(Kind.STRETCH, (call.data,), made, axes=tuple(range(first, first + len(shape) - 2)))


def concatenated(call: Called) -> str:
    """One behind the other."""
    made = call.made()
    axis = call.step.number("axis", -1)
    if axis == 0 or any(len(call.shape(value)) != len(made) for value in call.inputs):
        raise UnknownShapeError
    return call.does(Kind.CONCAT, call.inputs, made, axis=axis % len(made))


def flat(call: Called) -> str:
    """All axes in one; space before channels, whatever the layer has."""
    data = call.data
    if call.step.is_channels_first and len(call.shape(data)) > 2:
        data = call.turned(data, (0, *range(2, len(call.shape(data))), 1))
    return call.does(Kind.RESHAPE, (data,), call.made())


def reshaped(call: Called) -> str:
    """Another shape."""
    return call.does(Kind.RESHAPE, (call.data,), call.made())


def permuted(call: Called) -> str:
    """Axes in another order, counted from 1."""
    made = call.made()
    order = (0, *call.step.numbers("dims", len(made) - 1))
    return call.does(Kind.TRANSPOSE, (call.data,), made, order=order)


def repeated(call: Called) -> str:
    """The same again and again along a new axis."""
    shape, made = call.shape(call.data), call.made()
    line = call.does(Kind.RESHAPE, (call.data,), (shape[0], 1, *shape[1:]))
    return call.does(Kind.STRETCH, (line,), made, axes=(1,))


def normal(call: Called) -> str:
    """What needs all numbers of some axes at once, and leaves the shape as it is."""
    shape = call.shape(call.data)
    said = plain(call.step.config.get("axis", -1))
    axes = said if isinstance(said, list) else [said]
    if not all(type(axis) is int and -len(shape) < axis < len(shape) for axis in axes):
        raise UnknownShapeError
    return call.does(Kind.STRETCH, (call.data,), shape, axes=tuple(sorted({axis % len(shape) for axis in axes})))


def together(call: Called) -> str:
    """Sums, products, means: what meets at a position."""
    made = call.made()
    if any(len(call.shape(value)) != len(made) for value in call.inputs):
        # Keras and NumPy do not agree on how to match ranks.
        raise UnknownShapeError
    return call.does(Kind.EACH, call.inputs, made)


def alike(call: Called) -> str:
    """Sums of values of one shape."""
    shapes = {call.shape(value) for value in call.inputs}
    if len(shapes) != 1:
        raise UnknownShapeError
    return call.does(Kind.EACH, call.inputs, shapes.pop())


def alone(call: Called) -> str:
    """Element by element."""
    return call.does(Kind.EACH, (call.data,), call.shape(call.data))


def rescaled(call: Called) -> str:
    """The same scale and offset for all."""
    if any(isinstance(plain(call.step.config.get(key)), list) for key in ("scale", "offset")):
        raise UnknownShapeError
    return alone(call)


def loosely(call: Called) -> str:
    """Arithmetic with broadcasting as NumPy has it."""
    shapes = [call.shape(value) for value in call.inputs]
    rank = max(map(len, shapes), default=0)
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    lengths = [{length for length in axis if length != 1} for axis in zip(*padded, strict=True)]
    if any(len(axis) > 1 for axis in lengths):
        raise UnknownShapeError
    longest = [max(axis, default=1) for axis in lengths]
    return call.does(Kind.EACH, call.inputs, whole(longest[1:], call.batch))
