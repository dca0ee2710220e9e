"""Activations of Keras layers: element by element, over an axis, or of a kind that nothing is known of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prunectl.channels.graph import Kind
from prunectl.channels.keras.called import Called
from prunectl.formats.keras.config import named, text

_EACH = frozenset(
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
    if name in _EACH:
        return call.does(Kind.EACH, (value,), shape)
    kind = Kind.STRETCH if name in _OVER_THE_LAST else Kind.UNKNOWN
    words: dict[str, Any] = {"axes": (len(shape) - 1,)} if kind is Kind.STRETCH else {}
    return call.net.add(call.name, name, kind, (value,), (shape,), **words)[0]


def is_steady(config: Mapping[str, Any]) -> bool:
    """Whether a recurrent layer has activations under which its units do not meet but in its weights."""
    return name_of(config.get("activation")) in _STEADY and name_of(config.get("recurrent_activation")) in _EACH


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
