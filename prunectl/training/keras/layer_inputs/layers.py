"""Which layers are understood, by the names that both Kerases give them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from string import ascii_letters
from typing import Any

import numpy as np

from prunectl.training.backend import Array
from prunectl.training.keras import backend
from prunectl.training.keras.backend import Library
from prunectl.training.layer_inputs import SlidingWindow, Use


@dataclass(frozen=True, slots=True)
class Call:
    """One run of a layer, with numbers."""

    library: Library
    layer: Any
    inputs: tuple[Array, ...]
    """What goes in, and for a recurrent cell then its states; 32 bits each."""
    out_shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LayerUse:
    """A variable that meets some inputs."""

    variable: Any
    inputs: Array
    use: Use


Tell = Callable[[Call], Iterator[LayerUse]]


def numbers_in(library: Library, tensor: Any) -> Array | None:
    """A tensor as 32-bit numbers; None where there are none yet, as while a graph is traced."""
    if not isinstance(tensor, np.ndarray) and not _is_filled(library, tensor):
        return None
    if isinstance(tensor, np.ndarray):
        found = tensor
    elif library.is_two:
        found = tensor.numpy()
    else:
        found = library.keras.ops.convert_to_numpy(tensor)
    return np.asarray(found).astype(np.float32, copy=False)


def _is_filled(library: Library, tensor: Any) -> bool:
    if library.is_on_tensorflow:
        tf = library.tensorflow
        return isinstance(tensor, tf.Tensor) and not tf.is_symbolic_tensor(tensor)
    if library.backend == "torch":
        return isinstance(tensor, library.torch.Tensor)
    jax = library.jax
    return isinstance(tensor, jax.Array) and not isinstance(tensor, jax.core.Tracer)


def tree(library: Library) -> Any:
    """What takes nested structures apart."""
    return library.tensorflow.nest if library.is_two else library.keras.tree


_PLAIN = Use(out_axis=1, in_axis=0)


def dense(call: Call) -> Iterator[LayerUse]:
    """A dense layer multiplies the last axis."""
    yield LayerUse(call.layer.kernel, call.inputs[0], _PLAIN)


def by_equation(call: Call) -> Iterator[LayerUse]:
    """A product by what is contracted, such as the heads of attention; an axis that is not makes groups."""
    x = call.inputs[0]
    first, kernel, last = _terms(call.layer.equation, x.ndim)
    if any(len(set(term)) != len(term) for term in (first, kernel, last)) or not set(first) <= {*kernel, *last}:
        return
    size = backend.shape(call.layer.kernel)
    plain = _as_a_matrix(first, kernel, last, size)
    if plain is not None:
        yield LayerUse(call.layer.kernel, x.reshape(*x.shape[: -plain[1]], -1), plain[0])
        return
    contracted = [one for one in kernel if one in first and one not in last]
    shared = [one for one in kernel if one in first and one in last]
    made = [one for one in kernel if one not in first]
    grouping = shared + made[:-1]
    if len(contracted) != 1 or not made or len(grouping) > 1:
        return
    rest = [one for one in first if one not in {*contracted, *shared}]
    x = x.transpose([first.index(one) for one in (*rest, *shared, *contracted)])
    sizes = dict(zip(kernel, size, strict=True))
    groups = sizes[grouping[0]] if grouping else 1
    if grouping and not shared:
        # An axis that the inputs do not have, as that of attention heads: each group has the same inputs.
        x = np.broadcast_to(x[..., np.newaxis, :], (*x.shape[:-1], groups, x.shape[-1]))
    use = Use(
        out_axis=kernel.index(made[-1]),
        in_axis=kernel.index(contracted[0]),
        groups=groups,
        group_axis=kernel.index(grouping[0]) if grouping else None,
    )
    yield LayerUse(call.layer.kernel, x.reshape(*x.shape[: len(rest)], -1), use)


def _as_a_matrix(first: str, kernel: str, last: str, size: tuple[int, ...]) -> tuple[Use, int] | None:
    """How a kernel is a matrix of what is contracted by what is made, and how many axes are contracted."""
    contracted = "".join(one for one in kernel if one in first and one not in last)
    made = "".join(one for one in kernel if one not in first)
    if not contracted or not made or not first.endswith(contracted) or not last.endswith(made):
        return None
    inputs = math.prod(size[kernel.index(one)] for one in contracted)
    outputs = math.prod(size[kernel.index(one)] for one in made)
    if kernel == contracted + made:
        return Use(out_axis=1, in_axis=0, shape=(inputs, outputs)), len(contracted)
    if kernel == made + contracted:
        return Use(out_axis=0, in_axis=1, shape=(outputs, inputs)), len(contracted)
    return None


def _terms(equation: str, axes: int) -> tuple[str, str, str]:
    """The letters of inputs, kernel and outputs, with some for the axes that dots stand for."""
    operands, last = equation.replace(" ", "").split("->")
    first, kernel = operands.split(",")
    unused = [one for one in ascii_letters if one not in equation]
    dots = "".join(unused[: axes - len(first.replace("...", ""))])
    return first.replace("...", dots), kernel, last.replace("...", dots)


def recurrent(call: Call) -> Iterator[LayerUse]:
    """The cell of a simple recurrent layer or an LSTM: one kernel for the inputs, one for the state."""
    x, state = call.inputs[:2]
    yield LayerUse(call.layer.kernel, x, _PLAIN)
    yield LayerUse(call.layer.recurrent_kernel, state, _PLAIN)


def gated(call: Call) -> Iterator[LayerUse]:
    """The cell of a GRU; an older kind resets the state before the candidate's columns meet it."""
    cell = call.layer
    if cell.reset_after:
        yield from recurrent(call)
        return
    (x, state), units = call.inputs[:2], int(cell.units)
    yield LayerUse(cell.kernel, x, _PLAIN)
    yield LayerUse(cell.recurrent_kernel, state, Use(1, 0, outputs=(0, 2 * units)))
    reset = _gate(call, x, state, slice(units, 2 * units))
    yield LayerUse(cell.recurrent_kernel, reset * state, Use(1, 0, outputs=(2 * units, 3 * units)))


def _gate(call: Call, x: Array, state: Array, columns: slice) -> Array:
    cell = call.layer

    def of(variable: Any) -> Array:
        return backend.read(call.library, variable)[..., columns].astype(np.float32)

    before = x @ of(cell.kernel) + state @ of(cell.recurrent_kernel)
    if cell.use_bias:
        before = before + of(cell.bias)
    if call.library.is_two:
        return np.asarray(cell.recurrent_activation(call.library.tensorflow.constant(before)))
    ops = call.library.keras.ops
    found: Array = ops.convert_to_numpy(cell.recurrent_activation(ops.convert_to_tensor(before)))
    return found


def convolved_apart(x: Array, kernel: Array, window: SlidingWindow) -> Array:
    """What a depthwise kernel makes of channels, from (examples, channels, space)."""
    padded = np.pad(x, ((0, 0), (0, 0), *window.pads))
    sizes, multiplier = kernel.shape[:-2], kernel.shape[-1]
    made = tuple(
        (length - (size - 1) * dilation - 1) // stride + 1
        for length, size, dilation, stride in zip(
            padded.shape[2:], sizes, window.dilations, window.strides, strict=True
        )
    )
    found = np.zeros((*x.shape[:2], multiplier, *made), np.float32)
    for place in product(*map(range, sizes)):
        seen = tuple(
            slice(at * dilation, at * dilation + (count - 1) * stride + 1, stride)
            for at, dilation, count, stride in zip(place, window.dilations, made, window.strides, strict=True)
        )
        weight = kernel[place].reshape(*kernel.shape[-2:], *(1,) * len(sizes))
        found += padded[(slice(None), slice(None), *seen)][:, :, np.newaxis] * weight
    return found.reshape(len(x), -1, *made)


Pads = tuple[int, int]


def convolution(call: Call) -> Iterator[LayerUse]:
    """A kernel (..., in, out)."""
    layer, x = call.layer, _channels_first(call)
    use = Use(
        out_axis=layer.rank + 1,
        in_axis=layer.rank,
        groups=int(getattr(layer, "groups", 1)),
        window=_window(layer, x.shape[2:]),
    )
    yield LayerUse(layer.kernel, x, use)


def depthwise(call: Call) -> Iterator[LayerUse]:
    """A kernel (..., channels, multiplier)."""
    layer, x = call.layer, _channels_first(call)
    yield LayerUse(_depthwise_kernel(layer), x, _depthwise_use(layer, x))


def separable(call: Call) -> Iterator[LayerUse]:
    """A depthwise kernel, then one that mixes the channels at each place."""
    layer, x = call.layer, _channels_first(call)
    use = _depthwise_use(layer, x)
    yield LayerUse(layer.depthwise_kernel, x, use)
    kernel = backend.read(call.library, layer.depthwise_kernel).astype(np.float32)
    assert use.window is not None
    one = (1,) * layer.rank
    window = SlidingWindow(one, one, ((0, 0),) * layer.rank)
    yield LayerUse(
        layer.pointwise_kernel,
        convolved_apart(x, kernel, use.window),
        Use(out_axis=layer.rank + 1, in_axis=layer.rank, window=window),
    )


def transposed(call: Call) -> Iterator[LayerUse]:
    """A kernel (..., out, in)."""
    layer, x = call.layer, _channels_first(call)
    made = call.out_shape[-layer.rank - 1 : -1] if _is_channels_last(layer) else call.out_shape[-layer.rank :]
    sizes = zip(x.shape[2:], made, _reach(layer), layer.strides, strict=True)
    window = SlidingWindow(
        tuple(layer.strides),
        tuple(layer.dilation_rate),
        tuple(_cut(layer.padding, *each) for each in sizes),
        is_transposed=True,
    )
    yield LayerUse(layer.kernel, x, Use(out_axis=layer.rank, in_axis=layer.rank + 1, window=window))


def _is_channels_last(layer: Any) -> bool:
    return bool(layer.data_format == "channels_last")


def _channels_first(call: Call) -> Array:
    """Inputs as (examples, channels, space)."""
    layer, x = call.layer, call.inputs[0]
    # Keras 2 takes several axes of examples.
    x = x.reshape(-1, *x.shape[-layer.rank - 1 :])
    return np.moveaxis(x, -1, 1) if _is_channels_last(layer) else x


def _depthwise_kernel(layer: Any) -> Any:
    """Keras 2 has another word for it."""
    return layer.depthwise_kernel if hasattr(layer, "depthwise_kernel") else layer.kernel


def _depthwise_use(layer: Any, x: Array) -> Use:
    return Use(
        out_axis=layer.rank + 1,
        in_axis=None,
        groups=x.shape[1],
        group_axis=layer.rank,
        window=_window(layer, x.shape[2:]),
    )


def _window(layer: Any, space: tuple[int, ...]) -> SlidingWindow:
    sizes = zip(space, _reach(layer), layer.strides, strict=True)
    return SlidingWindow(
        tuple(layer.strides), tuple(layer.dilation_rate), tuple(_around(layer.padding, *each) for each in sizes)
    )


def _reach(layer: Any) -> tuple[int, ...]:
    """How far a kernel reaches along each axis of space."""
    return tuple(
        (size - 1) * dilation + 1 for size, dilation in zip(layer.kernel_size, layer.dilation_rate, strict=True)
    )


def _around(padding: str, length: int, reach: int, stride: int) -> Pads:
    """The zeros before and after; as TensorFlow has it, which all backends follow, the odd one comes after."""
    if padding == "causal":
        return reach - 1, 0
    if padding == "valid":
        return 0, 0
    total = max((-(-length // stride) - 1) * stride + reach - length, 0)
    return total // 2, total - total // 2


def _cut(padding: str, length: int, made: int, reach: int, stride: int) -> Pads:
    """What of the full result is cut off before and after, below zero where zeros are added."""
    full = (length - 1) * stride + reach
    before = max(full - made, 0) // 2 if padding == "same" else 0
    return before, full - made - before


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
    """What says what a layer's kernels meet; None where that is not known."""
    return _TELLS.get(_name(layer))


def is_stepping(layer: Any) -> bool:
    """Whether a layer runs a cell over time in the way of Keras."""
    return _name(layer) in _STEPPING


def has_own_code(layer: Any) -> bool:
    """Whether a layer is not one of Keras itself."""
    return not _is_keras(type(layer))


def _name(layer: Any) -> str:
    """The name of the layer of Keras that something works like; none if it works in its own way."""
    for kind in type(layer).__mro__:
        if _is_keras(kind):
            return kind.__name__
        if _WORKINGS & vars(kind).keys():
            return ""
    return ""


def _is_keras(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in {"keras", "tf_keras"}
