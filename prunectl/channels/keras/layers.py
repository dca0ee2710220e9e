"""Keras layers that move numbers about, slide windows over space, or put values together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prunectl.channels.graph import OpKind
from prunectl.channels.keras.builder import Called, with_batch
from prunectl.formats.keras.config import named, text
from prunectl.formats.keras.flops.shapes import UnknownShapeError, untuple


def spatial(call: Called) -> str:
    """Pools, borders and sizes: axes of space change, or go."""
    shape, made = call.shape(call.data), call.made()
    first = 2 if call.step.is_channels_first else 1
    return call.does(OpKind.STRETCH, (call.data,), made, axes=tuple(range(first, first + len(shape) - 2)))


def concatenated(call: Called) -> str:
    """One behind the other."""
    made = call.made()
    axis = call.step.number("axis", -1)
    if axis == 0 or any(len(call.shape(value)) != len(made) for value in call.inputs):
        raise UnknownShapeError
    return call.does(OpKind.CONCAT, call.inputs, made, axis=axis % len(made))


def flat(call: Called) -> str:
    """All axes in one; space before channels, whatever the layer has."""
    data = call.data
    if call.step.is_channels_first and len(call.shape(data)) > 2:
        data = call.turned(data, (0, *range(2, len(call.shape(data))), 1))
    return call.does(OpKind.RESHAPE, (data,), call.made())


def reshaped(call: Called) -> str:
    """Another shape."""
    return call.does(OpKind.RESHAPE, (call.data,), call.made())


def permuted(call: Called) -> str:
    """Axes in another order, counted from 1."""
    made = call.made()
    order = (0, *call.step.numbers("dims", len(made) - 1))
    return call.does(OpKind.TRANSPOSE, (call.data,), made, order=order)


def repeated(call: Called) -> str:
    """The same again and again along a new axis."""
    shape, made = call.shape(call.data), call.made()
    line = call.does(OpKind.RESHAPE, (call.data,), (shape[0], 1, *shape[1:]))
    return call.does(OpKind.STRETCH, (line,), made, axes=(1,))


def normal(call: Called) -> str:
    """What needs all numbers of some axes at once, and leaves the shape as it is."""
    shape = call.shape(call.data)
    said = untuple(call.step.config.get("axis", -1))
    axes = said if isinstance(said, list) else [said]
    if not all(type(axis) is int and -len(shape) < axis < len(shape) for axis in axes):
        raise UnknownShapeError
    return call.does(OpKind.STRETCH, (call.data,), shape, axes=tuple(sorted({axis % len(shape) for axis in axes})))


def together(call: Called) -> str:
    """Sums, products, means: what meets at a position."""
    made = call.made()
    if any(len(call.shape(value)) != len(made) for value in call.inputs):
        # Keras and NumPy do not agree on how to match ranks.
        raise UnknownShapeError
    return call.does(OpKind.EACH, call.inputs, made)


def alike(call: Called) -> str:
    """Sums of values of one shape."""
    shapes = {call.shape(value) for value in call.inputs}
    if len(shapes) != 1:
        raise UnknownShapeError
    return call.does(OpKind.EACH, call.inputs, shapes.pop())


def alone(call: Called) -> str:
    """Element by element."""
    return call.does(OpKind.EACH, (call.data,), call.shape(call.data))


def rescaled(call: Called) -> str:
    """The same scale and offset for all."""
    if any(isinstance(untuple(call.step.config.get(key)), list) for key in ("scale", "offset")):
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
    return call.does(OpKind.EACH, call.inputs, with_batch(longest[1:], call.batch))


_ELEMENTWISE_ACTIVATIONS = frozenset(
    {
        *("linear", "relu", "relu6", "leakyrelu", "elu", "selu", "gelu", "celu", "silu", "swish", "mish", "sigmoid"),
        *("hardsigmoid", "hardswish", "hardsilu", "hardtanh", "hardshrink", "softshrink", "tanhshrink", "tanh"),
        *("softplus", "softsign", "exponential", "logsigmoid", "squareplus", "threshold", "sparseplus"),
        *("sparsesigmoid",),
    }
)
_STEADY = frozenset(
    {
        *("linear", "relu", "relu6", "leakyrelu", "elu", "selu", "gelu", "celu", "silu", "swish", "mish", "sigmoid"),
        *("hardswish", "hardsilu", "hardtanh", "tanh", "softsign"),
    }
)
"""Those that a unit can be left to that has no weights any more: it stays where it is."""
_OVER_THE_LAST = frozenset({"softmax", "logsoftmax", "sparsemax"})


def activated(call: Called, value: str) -> str:
    """Put in what a layer does to its own output."""
    return by_name(call, value, name_of(call.step.config.get("activation")))


def by_name(call: Called, value: str, name: str) -> str:
    """Put in an activation."""
    shape = call.shape(value)
    if name == "linear":
        return value
    if name in _ELEMENTWISE_ACTIVATIONS:
        return call.does(OpKind.EACH, (value,), shape)
    kind = OpKind.STRETCH if name in _OVER_THE_LAST else OpKind.UNKNOWN
    words: dict[str, Any] = {"axes": (len(shape) - 1,)} if kind is OpKind.STRETCH else {}
    return call.net.add(call.name, name, kind, (value,), (shape,), **words)[0]


def is_steady(config: Mapping[str, Any]) -> bool:
    """Whether a recurrent layer has activations under which its units do not meet but in its weights."""
    return (
        name_of(config.get("activation")) in _STEADY
        and name_of(config.get("recurrent_activation")) in _ELEMENTWISE_ACTIVATIONS
    )


def name_of(said: Any) -> str:
    """Return the name of an activation as one word in small letters."""
    if said is None:
        return "linear"
    if isinstance(said, dict) and text(said, "class_name") == "function":
        # One that somebody registered is not the one of Keras, whatever its name is.
        said = said.get("registered_name") if ">" in text(said, "registered_name") else said.get("config")
        return str(said).replace("_", "").lower()
    if isinstance(said, str) and ">" in said:
        return said
    return named(said).replace("_", "").lower()


_ELEMENTWISE_FUNCTIONS = frozenset(
    {
        *("add", "addv2", "subtract", "sub", "multiply", "mul", "truediv", "divide", "divnonan", "realdiv", "pow"),
        *("power", "maximum", "minimum", "relu", "relu6", "leakyrelu", "elu", "selu", "gelu", "silu", "swish"),
        *("sigmoid", "hardsigmoid", "hardswish", "hardsilu", "tanh", "softplus", "softsign", "exp", "log", "sqrt"),
        *("rsqrt", "square", "abs", "absolute", "negative", "neg", "sign", "cast", "clipbyvalue", "clip", "identity"),
        *("stopgradient", "round", "floor", "ceil", "erf", "sin", "cos", "expm1", "log1p", "reciprocal", "mish"),
    }
)


def function(call: Called) -> str:
    """A function, told by its name: the last of `math.multiply`, or the class of an operation."""
    name = call.step.word("function").rpartition(".")[2].replace("_", "")
    if name not in _ELEMENTWISE_FUNCTIONS or call.step.flag("has_lists"):
        raise UnknownShapeError
    return loosely(call)
