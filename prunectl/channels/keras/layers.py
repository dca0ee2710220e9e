"""Rules of Keras layers without weights: elementwise, merging, reshaping, pooling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prunectl.channels.graph import OpKind
from prunectl.channels.keras.builder import LayerContext, with_batch
from prunectl.formats import budgets
from prunectl.formats.keras.config import object_name, string_in, untuple
from prunectl.formats.keras.flops.shapes import UnknownShapeError


def pool_or_pad(call: LayerContext) -> str:
    """Pooling, padding, cropping, resizing: spatial axes change, or are reduced."""
    shape, output = call.shape(call.data), call.output_shape()
    first = 2 if call.layer.is_channels_first else 1
    return call.emit(OpKind.ALONG_AXES, (call.data,), output, axes=tuple(range(first, first + len(shape) - 2)))


def concatenate(call: LayerContext) -> str:
    """Concatenation along an axis."""
    output = call.output_shape()
    axis = call.layer.number("axis", -1)
    if axis == 0 or any(len(call.shape(value)) != len(output) for value in call.inputs):
        raise UnknownShapeError
    return call.emit(OpKind.CONCAT, call.inputs, output, axis=axis % len(output))


def flatten(call: LayerContext) -> str:
    """Flatten, which first moves the channels to the last axis, in both data formats."""
    data = call.data
    if call.layer.is_channels_first and len(call.shape(data)) > 2:
        data = call.transpose(data, (0, *range(2, len(call.shape(data))), 1))
    return call.emit(OpKind.RESHAPE, (data,), call.output_shape())


def reshape(call: LayerContext) -> str:
    """A reshape."""
    return call.emit(OpKind.RESHAPE, (call.data,), call.output_shape())


def permute(call: LayerContext) -> str:
    """A transpose; the setting `dims` counts axes from 1."""
    output = call.output_shape()
    order = (0, *call.layer.numbers("dims", len(output) - 1))
    return call.emit(OpKind.TRANSPOSE, (call.data,), output, order=order)


def repeat(call: LayerContext) -> str:
    """Repetition along a new axis."""
    shape, output = call.shape(call.data), call.output_shape()
    row = call.emit(OpKind.RESHAPE, (call.data,), (shape[0], 1, *shape[1:]))
    return call.emit(OpKind.ALONG_AXES, (row,), output, axes=(1,))


def normalize(call: LayerContext) -> str:
    """Softmax, masking and layer normalisation, which mix all elements along some axes."""
    shape = call.shape(call.data)
    setting = untuple(call.layer.config.get("axis", -1))
    axes = setting if isinstance(setting, list) else [setting]
    if not all(type(axis) is int and -len(shape) < axis < len(shape) for axis in axes):
        raise UnknownShapeError
    return call.emit(OpKind.ALONG_AXES, (call.data,), shape, axes=tuple(axes))


def merge(call: LayerContext) -> str:
    """Elementwise merging: sum, product, mean, extremes."""
    output = call.output_shape()
    if any(len(call.shape(value)) != len(output) for value in call.inputs):
        # Keras and NumPy broadcast values of different ranks in different ways.
        raise UnknownShapeError
    return call.emit(OpKind.ELEMENTWISE, call.inputs, output)


def merge_same_shape(call: LayerContext) -> str:
    """A sum of values of the same shape."""
    shapes = {call.shape(value) for value in call.inputs}
    if len(shapes) != 1:
        raise UnknownShapeError
    return call.emit(OpKind.ELEMENTWISE, call.inputs, shapes.pop())


def elementwise(call: LayerContext) -> str:
    """An elementwise layer."""
    return call.emit(OpKind.ELEMENTWISE, (call.data,), call.shape(call.data))


def rescale(call: LayerContext) -> str:
    """A scale and an offset that are the same for all elements."""
    if any(isinstance(untuple(call.layer.config.get(key)), list) for key in ("scale", "offset")):
        raise UnknownShapeError
    return elementwise(call)


def broadcast(call: LayerContext) -> str:
    """Arithmetic with the broadcasting rules of NumPy."""
    shapes = [call.shape(value) for value in call.inputs]
    rank = max(map(len, shapes), default=0)
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    lengths = [{length for length in axis if length != 1} for axis in zip(*padded, strict=True)]
    if any(len(axis) > 1 for axis in lengths):
        raise UnknownShapeError
    longest = [max(axis, default=1) for axis in lengths]
    return call.emit(OpKind.ELEMENTWISE, call.inputs, with_batch(longest[1:], call.batch))


_ELEMENTWISE_ACTIVATIONS = frozenset(
    {
        *("linear", "relu", "relu6", "leakyrelu", "elu", "selu", "gelu", "celu", "silu", "swish", "mish", "sigmoid"),
        *("hardsigmoid", "hardswish", "hardsilu", "hardtanh", "hardshrink", "softshrink", "tanhshrink", "tanh"),
        *("softplus", "softsign", "exponential", "logsigmoid", "squareplus", "threshold", "sparseplus"),
        *("sparsesigmoid",),
    }
)
_RECURRENT_ACTIVATIONS = frozenset(
    {
        *("linear", "relu", "relu6", "leakyrelu", "elu", "selu", "gelu", "celu", "silu", "swish", "mish", "sigmoid"),
        *("hardswish", "hardsilu", "hardtanh", "tanh", "softsign"),
    }
)
"""The supported activations of recurrent layers; all but sigmoid map 0 to 0, so a unit without weights stays at 0."""
_SOFTMAX_LIKE = frozenset({"softmax", "logsoftmax", "sparsemax"})


def apply_activation(call: LayerContext, value: str) -> str:
    """Emit the activation of a layer."""
    return activation(call, value, activation_name(call.layer.config.get("activation")))


def activation(call: LayerContext, value: str, name: str) -> str:
    """Emit an activation by its name."""
    shape = call.shape(value)
    if name == "linear":
        return value
    if name in _ELEMENTWISE_ACTIVATIONS:
        return call.emit(OpKind.ELEMENTWISE, (value,), shape)
    kind = OpKind.ALONG_AXES if name in _SOFTMAX_LIKE else OpKind.UNKNOWN
    attributes: dict[str, Any] = {"axes": (len(shape) - 1,)} if kind is OpKind.ALONG_AXES else {}
    return call.builder.add(call.name, name, kind, (value,), (shape,), **attributes)[0]


def has_known_activations(config: Mapping[str, Any]) -> bool:
    """Whether the activations of a recurrent layer are supported: elementwise, so that they do not mix units."""
    return (
        activation_name(config.get("activation")) in _RECURRENT_ACTIVATIONS
        and activation_name(config.get("recurrent_activation")) in _ELEMENTWISE_ACTIVATIONS
    )


def activation_name(value: Any) -> str:
    """The name of an activation, in lower case and without underscores; that of a user's function as it is."""
    if value is None:
        return "linear"
    if isinstance(value, dict) and string_in(value, "class_name") == "function":
        # A registered function of the user is not the one of Keras, even if it has the same name.
        value = value.get("registered_name") if ">" in string_in(value, "registered_name") else value.get("config")
        return str(value).replace("_", "").lower()
    if isinstance(value, str) and ">" in value:
        return value
    return object_name(value).replace("_", "").lower()


_ELEMENTWISE_FUNCTIONS = frozenset(
    {
        *("add", "addv2", "subtract", "sub", "multiply", "mul", "truediv", "divide", "divnonan", "realdiv", "pow"),
        *("power", "maximum", "minimum", "relu", "relu6", "leakyrelu", "elu", "selu", "gelu", "silu", "swish"),
        *("sigmoid", "hardsigmoid", "hardswish", "hardsilu", "tanh", "softplus", "softsign", "exp", "log", "sqrt"),
        *("rsqrt", "square", "abs", "absolute", "negative", "neg", "sign", "cast", "clipbyvalue", "clip", "identity"),
        *("stopgradient", "round", "floor", "ceil", "erf", "sin", "cos", "expm1", "log1p", "reciprocal", "mish"),
    }
)


def function(call: LayerContext) -> str:
    """A function, recognised by its name: the last part of `math.multiply`, or the class of an operation."""
    name = call.layer.word("function").rpartition(".")[2].replace("_", "")
    if name.removeprefix("reduce") in _REDUCTIONS:
        return reduce(call)
    if name not in _ELEMENTWISE_FUNCTIONS or call.layer.flag("has_lists"):
        raise UnknownShapeError
    return broadcast(call)


_REDUCTIONS = frozenset({"mean", "sum", "max", "min"})


def reduce(call: LayerContext) -> str:
    """A reduction along some axes, which keeps them with the length 1 only if it is asked to."""
    shape = call.shape(call.data)
    setting, initial = untuple(call.layer.config.get("axis")), call.layer.config.get("initial")
    # A first value for each channel cannot be made smaller.
    if not isinstance(initial, _SCALAR):
        raise UnknownShapeError
    axes = setting if isinstance(setting, list) else [setting]
    if not axes or not all(type(axis) is int and -len(shape) < axis < len(shape) and axis for axis in axes):
        raise UnknownShapeError
    positions = {axis % len(shape) for axis in axes}
    ones = tuple(1 if axis in positions else length for axis, length in enumerate(shape))
    reduced = call.emit(OpKind.ALONG_AXES, (call.data,), ones, axes=tuple(sorted(positions)))
    if call.layer.flag("keepdims"):
        return reduced
    return call.emit(
        OpKind.RESHAPE, (reduced,), tuple(length for axis, length in enumerate(shape) if axis not in positions)
    )


def keyword_arguments(node: Any) -> Mapping[str, Any]:
    """The keyword arguments of a call of a function in Keras 2, which follow the reference to its first tensor."""
    if isinstance(node, list) and node and not _is_reference(node):
        node = node[0]
    arguments = node[3] if isinstance(node, list) and len(node) > 3 else {}
    return arguments if isinstance(arguments, Mapping) else {}


_SCALAR = (int, float, str, bool, type(None))


def has_lists(argument: Any, nesting: int = 0) -> bool:
    """Whether an argument of a call contains a list of numbers, which may have one for each channel."""
    if nesting > budgets.MAX_INBOUND_DEPTH:
        return True
    if isinstance(argument, Mapping):
        if argument.get("class_name") == "__keras_tensor__":
            return False
        return any(has_lists(item, nesting + 1) for item in argument.values())
    if isinstance(argument, list):
        if _is_reference(argument):
            return any(has_lists(item, nesting + 1) for item in argument[3:])
        numbers = [item for item in argument if isinstance(item, int | float) and not isinstance(item, bool)]
        return len(numbers) > 1 or any(has_lists(item, nesting + 1) for item in argument)
    return not isinstance(argument, _SCALAR)


def _is_reference(argument: list[Any]) -> bool:
    """Whether a list is a reference to a layer, a call and an output; Keras 2 writes constants in the same form."""
    return (
        3 <= len(argument) <= 4
        and isinstance(argument[0], str)
        and type(argument[1]) is int
        and not isinstance(argument[2], list)
    )
