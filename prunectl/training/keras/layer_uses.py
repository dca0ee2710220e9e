"""Handlers that map a layer's call to the inputs of its weights, by the layer's class name in Keras 2 and 3."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from string import ascii_letters
from typing import Any

import numpy as np

from prunectl.formats.base import Array
from prunectl.training.backend import SlidingWindow, WeightUse
from prunectl.training.keras import backend
from prunectl.training.keras.backend import KerasLibrary


@dataclass(frozen=True, slots=True)
class LayerUse:
    """A call of a layer on concrete arrays."""

    library: KerasLibrary
    layer: Any
    inputs: tuple[Array, ...]
    """The inputs, followed by the states for a recurrent cell; all are float32."""
    out_shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WeightInput:
    """A weight variable and the inputs that it is multiplied with."""

    variable: Any
    inputs: Array
    use: WeightUse


LayerHandler = Callable[[LayerUse], Iterator[WeightInput]]


def concrete_array(library: KerasLibrary, tensor: Any) -> Array | None:
    """A tensor as a float32 array; None for a symbolic tensor, as while a graph is traced."""
    if not isinstance(tensor, np.ndarray) and not _is_concrete(library, tensor):
        return None
    if isinstance(tensor, np.ndarray):
        array = tensor
    elif library.is_keras2:
        array = tensor.numpy()
    else:
        array = library.keras.ops.convert_to_numpy(tensor)
    return np.asarray(array).astype(np.float32, copy=False)


def _is_concrete(library: KerasLibrary, tensor: Any) -> bool:
    if library.is_on_tensorflow:
        tf = library.tensorflow
        return isinstance(tensor, tf.Tensor) and not tf.is_symbolic_tensor(tensor)
    if library.backend == "torch":
        return isinstance(tensor, library.torch.Tensor)
    jax = library.jax
    return isinstance(tensor, jax.Array) and not isinstance(tensor, jax.core.Tracer)


def tree_of(library: KerasLibrary) -> Any:
    """The library's functions for nested structures."""
    return library.tensorflow.nest if library.is_keras2 else library.keras.tree


_MATMUL = WeightUse(out_axis=1, in_axis=0)


def dense(call: LayerUse) -> Iterator[WeightInput]:
    """A dense layer multiplies the last axis."""
    yield WeightInput(call.layer.kernel, call.inputs[0], _MATMUL)


def einsum_dense(call: LayerUse) -> Iterator[WeightInput]:
    """An einsum as a matrix product over its contracted axes; at most one other kernel axis becomes groups."""
    x = call.inputs[0]
    first, kernel, last = _terms(call.layer.equation, x.ndim)
    if any(len(set(term)) != len(term) for term in (first, kernel, last)) or not set(first) <= {*kernel, *last}:
        return
    size = backend.shape(call.layer.kernel)
    as_matrix = _as_matrix_product(first, kernel, last, size)
    if as_matrix is not None:
        yield WeightInput(call.layer.kernel, x.reshape(*x.shape[: -as_matrix[1]], -1), as_matrix[0])
        return
    contracted = [axis for axis in kernel if axis in first and axis not in last]
    shared = [axis for axis in kernel if axis in first and axis in last]
    produced = [axis for axis in kernel if axis not in first]
    grouping = shared + produced[:-1]
    if len(contracted) != 1 or not produced or len(grouping) > 1:
        return
    rest = [axis for axis in first if axis not in {*contracted, *shared}]
    x = x.transpose([first.index(axis) for axis in (*rest, *shared, *contracted)])
    sizes = dict(zip(kernel, size, strict=True))
    groups = sizes[grouping[0]] if grouping else 1
    if grouping and not shared:
        # An axis that the inputs lack, such as attention heads: each group has the same inputs.
        x = np.broadcast_to(x[..., np.newaxis, :], (*x.shape[:-1], groups, x.shape[-1]))
    use = WeightUse(
        out_axis=kernel.index(produced[-1]),
        in_axis=kernel.index(contracted[0]),
        groups=groups,
        group_axis=kernel.index(grouping[0]) if grouping else None,
    )
    yield WeightInput(call.layer.kernel, x.reshape(*x.shape[: len(rest)], -1), use)


def _as_matrix_product(first: str, kernel: str, last: str, size: tuple[int, ...]) -> tuple[WeightUse, int] | None:
    """The kernel as a matrix of contracted by produced axes, and the number of contracted axes; None if impossible."""
    contracted = "".join(axis for axis in kernel if axis in first and axis not in last)
    produced = "".join(axis for axis in kernel if axis not in first)
    if not contracted or not produced or not first.endswith(contracted) or not last.endswith(produced):
        return None
    inputs = math.prod(size[kernel.index(axis)] for axis in contracted)
    outputs = math.prod(size[kernel.index(axis)] for axis in produced)
    if kernel == contracted + produced:
        return WeightUse(out_axis=1, in_axis=0, shape=(inputs, outputs)), len(contracted)
    if kernel == produced + contracted:
        return WeightUse(out_axis=0, in_axis=1, shape=(outputs, inputs)), len(contracted)
    return None


def _terms(equation: str, axes: int) -> tuple[str, str, str]:
    """The letters of inputs, kernel and outputs, with unused letters in place of the dots."""
    operands, last = equation.replace(" ", "").split("->")
    first, kernel = operands.split(",")
    unused = [letter for letter in ascii_letters if letter not in equation]
    dots = "".join(unused[: axes - len(first.replace("...", ""))])
    return first.replace("...", dots), kernel, last.replace("...", dots)


def rnn_cell(call: LayerUse) -> Iterator[WeightInput]:
    """The cell of a simple recurrent layer or an LSTM: one kernel for the inputs, one for the state."""
    x, state = call.inputs[:2]
    yield WeightInput(call.layer.kernel, x, _MATMUL)
    yield WeightInput(call.layer.recurrent_kernel, state, _MATMUL)


def gru_cell(call: LayerUse) -> Iterator[WeightInput]:
    """The cell of a GRU; without `reset_after`, the candidate's columns see the reset state."""
    cell = call.layer
    if cell.reset_after:
        yield from rnn_cell(call)
        return
    (x, state), units = call.inputs[:2], int(cell.units)
    yield WeightInput(cell.kernel, x, _MATMUL)
    yield WeightInput(cell.recurrent_kernel, state, WeightUse(1, 0, outputs=(0, 2 * units)))
    reset = _gate(call, x, state, slice(units, 2 * units))
    yield WeightInput(cell.recurrent_kernel, reset * state, WeightUse(1, 0, outputs=(2 * units, 3 * units)))


def _gate(call: LayerUse, x: Array, state: Array, columns: slice) -> Array:
    cell = call.layer

    def columns_of(variable: Any) -> Array:
        return backend.get_value(call.library, variable)[..., columns].astype(np.float32)

    preactivation = x @ columns_of(cell.kernel) + state @ columns_of(cell.recurrent_kernel)
    if cell.use_bias:
        preactivation = preactivation + columns_of(cell.bias)
    if call.library.is_keras2:
        return np.asarray(cell.recurrent_activation(call.library.tensorflow.constant(preactivation)))
    ops = call.library.keras.ops
    gate: Array = ops.convert_to_numpy(cell.recurrent_activation(ops.convert_to_tensor(preactivation)))
    return gate


def depthwise_conv(x: Array, kernel: Array, window: SlidingWindow) -> Array:
    """Depthwise convolution of an array (examples, channels, spatial axes)."""
    padded = np.pad(x, ((0, 0), (0, 0), *window.pads))
    sizes, multiplier = kernel.shape[:-2], kernel.shape[-1]
    output_sizes = tuple(
        (length - (size - 1) * dilation - 1) // stride + 1
        for length, size, dilation, stride in zip(
            padded.shape[2:], sizes, window.dilations, window.strides, strict=True
        )
    )
    output = np.zeros((*x.shape[:2], multiplier, *output_sizes), np.float32)
    for offsets in product(*map(range, sizes)):
        window_ = tuple(
            slice(offset * dilation, offset * dilation + (count - 1) * stride + 1, stride)
            for offset, dilation, count, stride in zip(
                offsets, window.dilations, output_sizes, window.strides, strict=True
            )
        )
        weight = kernel[offsets].reshape(*kernel.shape[-2:], *(1,) * len(sizes))
        output += padded[(slice(None), slice(None), *window_)][:, :, np.newaxis] * weight
    return output.reshape(len(x), -1, *output_sizes)


Pads = tuple[int, int]


def convolution(call: LayerUse) -> Iterator[WeightInput]:
    """A kernel (..., in, out)."""
    layer, x = call.layer, _channels_first(call)
    use = WeightUse(
        out_axis=layer.rank + 1,
        in_axis=layer.rank,
        groups=int(getattr(layer, "groups", 1)),
        window=_window(layer, x.shape[2:]),
    )
    yield WeightInput(layer.kernel, x, use)


def depthwise(call: LayerUse) -> Iterator[WeightInput]:
    """A kernel (..., channels, multiplier)."""
    layer, x = call.layer, _channels_first(call)
    yield WeightInput(_depthwise_kernel(layer), x, _depthwise_use(layer, x))


def separable(call: LayerUse) -> Iterator[WeightInput]:
    """A depthwise kernel, then a pointwise (1x1) kernel that mixes the channels."""
    layer, x = call.layer, _channels_first(call)
    use = _depthwise_use(layer, x)
    yield WeightInput(layer.depthwise_kernel, x, use)
    kernel = backend.get_value(call.library, layer.depthwise_kernel).astype(np.float32)
    assert use.window is not None
    ones = (1,) * layer.rank
    window = SlidingWindow(ones, ones, ((0, 0),) * layer.rank)
    yield WeightInput(
        layer.pointwise_kernel,
        depthwise_conv(x, kernel, use.window),
        WeightUse(out_axis=layer.rank + 1, in_axis=layer.rank, window=window),
    )


def transposed(call: LayerUse) -> Iterator[WeightInput]:
    """A kernel (..., out, in)."""
    layer, x = call.layer, _channels_first(call)
    output_size = call.out_shape[-layer.rank - 1 : -1] if _is_channels_last(layer) else call.out_shape[-layer.rank :]
    sizes = zip(x.shape[2:], output_size, _effective_size(layer), layer.strides, strict=True)
    window = SlidingWindow(
        tuple(layer.strides),
        tuple(layer.dilation_rate),
        tuple(_transposed_padding(layer.padding, *lengths) for lengths in sizes),
        is_transposed=True,
    )
    yield WeightInput(layer.kernel, x, WeightUse(out_axis=layer.rank, in_axis=layer.rank + 1, window=window))


def _is_channels_last(layer: Any) -> bool:
    return bool(layer.data_format == "channels_last")


def _channels_first(call: LayerUse) -> Array:
    """Inputs as (examples, channels, spatial axes)."""
    layer, x = call.layer, call.inputs[0]
    # Keras 2 accepts several batch axes.
    x = x.reshape(-1, *x.shape[-layer.rank - 1 :])
    return np.moveaxis(x, -1, 1) if _is_channels_last(layer) else x


def _depthwise_kernel(layer: Any) -> Any:
    """The kernel of a depthwise layer, which has another name in Keras 2."""
    return layer.depthwise_kernel if hasattr(layer, "depthwise_kernel") else layer.kernel


def _depthwise_use(layer: Any, x: Array) -> WeightUse:
    return WeightUse(
        out_axis=layer.rank + 1,
        in_axis=None,
        groups=x.shape[1],
        group_axis=layer.rank,
        window=_window(layer, x.shape[2:]),
    )


def _window(layer: Any, space: tuple[int, ...]) -> SlidingWindow:
    sizes = zip(space, _effective_size(layer), layer.strides, strict=True)
    return SlidingWindow(
        tuple(layer.strides), tuple(layer.dilation_rate), tuple(_padding(layer.padding, *lengths) for lengths in sizes)
    )


def _effective_size(layer: Any) -> tuple[int, ...]:
    """The extent of a dilated kernel along each spatial axis."""
    return tuple(
        (size - 1) * dilation + 1 for size, dilation in zip(layer.kernel_size, layer.dilation_rate, strict=True)
    )


def _padding(padding: str, length: int, reach: int, stride: int) -> Pads:
    """Zeros before and after; an odd zero comes after, as in TensorFlow, which all backends follow."""
    if padding == "causal":
        return reach - 1, 0
    if padding == "valid":
        return 0, 0
    total = max((-(-length // stride) - 1) * stride + reach - length, 0)
    return total // 2, total - total // 2


def _transposed_padding(padding: str, length: int, output_length: int, reach: int, stride: int) -> Pads:
    """The length cropped from the full result before and after; negative where zeros are added."""
    full_length = (length - 1) * stride + reach
    before = max(full_length - output_length, 0) // 2 if padding == "same" else 0
    return before, full_length - output_length - before


KERNELS = ("kernel", "recurrent_kernel", "depthwise_kernel", "pointwise_kernel")
"""Attributes of layers with the weights whose inputs can be captured."""
_HANDLERS: dict[str, LayerHandler] = {
    "Dense": dense,
    "EinsumDense": einsum_dense,
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
    "SimpleRNNCell": rnn_cell,
    "LSTMCell": rnn_cell,
    "GRUCell": gru_cell,
}
_RNN_LAYERS = frozenset({"RNN", "SimpleRNN", "LSTM", "GRU"})
_FORWARD_METHODS = frozenset({"call", "__call__", "convolution_op", "inner_loop", "kernel"})
"""Methods that a subclass overrides when it changes the computation."""


def handler_for(layer: Any) -> LayerHandler | None:
    """The handler of a layer; None if its class is unknown."""
    return _HANDLERS.get(_keras_class(layer))


def is_rnn(layer: Any) -> bool:
    """Whether a layer is a recurrent layer that computes as Keras' own do."""
    return _keras_class(layer) in _RNN_LAYERS


def is_custom(layer: Any) -> bool:
    """Whether a layer's class is defined outside Keras."""
    return not _is_keras(type(layer))


def _keras_class(layer: Any) -> str:
    """The name of the Keras class whose computation a layer inherits; empty if it overrides the computation."""
    for kind in type(layer).__mro__:
        if _is_keras(kind):
            return kind.__name__
        if _FORWARD_METHODS & vars(kind).keys():
            return ""
    return ""


def _is_keras(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in {"keras", "tf_keras"}
