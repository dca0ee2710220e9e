"""Bare functions of TensorFlow and of Keras 3 that a model calls between its layers."""

from __future__ import annotations

from prunectl.channels.keras.called import Called
from prunectl.channels.keras.moving import loosely
from prunectl.formats.keras.shapes import UnknownShapeError

_EACH = frozenset(
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
    if name not in _EACH or call.step.flag("has_lists"):
        raise UnknownShapeError
    return loosely(call)
