"""Which layers are understood, by the names that both Kerases give them."""

from __future__ import annotations

from typing import Any

from prunectl.training.keras.sights.meeting import Tell
from prunectl.training.keras.sights.products import by_equation, dense, gated, recurrent
from prunectl.training.keras.sights.windows import convolution, depthwise, separable, transposed

KERNELS = ("kernel", "recurrent_kernel", "depthwise_kernel", "pointwise_kernel")
"""What layers call the variables that can be shown."""
_TELLS: dict[str, Tell] = {
    "Dense": dense,
    "EinsumDense": by_equation,
    "Conv1D": convolution,
    "Conv2D": convolution,
    "Conv3D": convolution,
    "DepthwiseConv1D": depthwise,
    "DepthwiseConv2D": depthwise,
    "SeparableConv1D": separable,
    "SeparableConv2D": separable,
    "Conv1DTranspose": transposed,
    "Conv2DTranspose": transposed,
    "Conv3DTranspose": transposed,
    "SimpleRNNCell": recurrent,
    "LSTMCell": recurrent,
    "GRUCell": gated,
}
_STEPPING = frozenset({"RNN", "SimpleRNN", "LSTM", "GRU"})
_WORKINGS = frozenset({"call", "__call__", "convolution_op", "inner_loop", "kernel"})
"""What a class that changes how a layer works defines anew."""


def tell(layer: Any) -> Tell | None:
    """Return what says what a layer's kernels meet; None where that is not known."""
    return _TELLS.get(_name(layer))


def is_stepping(layer: Any) -> bool:
    """Whether a layer runs a cell over time in the way of Keras."""
    return _name(layer) in _STEPPING


def has_own_code(layer: Any) -> bool:
    """Whether a layer is not one of Keras itself."""
    return not _is_keras(type(layer))


def _name(layer: Any) -> str:
    """Return the name of the layer of Keras that something works like; none if it works in its own way."""
    for kind in type(layer).__mro__:
        if _is_keras(kind):
            return kind.__name__
        if _WORKINGS & vars(kind).keys():
            return ""
    return ""


def _is_keras(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in {"keras", "tf_keras"}
