"""The inputs of layers in ONNX graphs: for each operator, the inputs that its weights are multiplied with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunectl.formats.base import Array
from prunectl.onnx_graph import STANDARD_DOMAINS, get_attribute, input_of, output_of
from prunectl.training.backend import SlidingWindow, WeightUse
from prunectl.training.onnx.session import RunValues, WeightSite

Inputs = Iterator[tuple[Array, WeightUse]]
"""The inputs that a tensor is multiplied with, and how."""


@dataclass(frozen=True, slots=True)
class InputCapture:
    """How to get the inputs of a tensor from a run."""

    needs: tuple[str, ...]
    """The names of the values that must be recorded."""
    compute: Callable[[RunValues], Inputs]
    """From these values to the inputs."""


DATA, KERNEL, RECURRENT, BIAS, LENGTHS, FIRST = 0, 1, 2, 3, 4, 5
"""The positions of the inputs of recurrent operators; FIRST is the initial state."""


def present_inputs(node: Any, *indices: int) -> tuple[str, ...]:
    """The names of these inputs, without those that are left out."""
    return tuple(name for name in (input_of(node, index) for index in indices) if name)


def drop_padded_steps(node: Any, values: RunValues, inputs: Array) -> Array | None:
    """The inputs without padding, in which case steps and batch become one axis; None if the padding is not known."""
    steps, batch = values[input_of(node, DATA)].shape[:2]
    lengths = _lengths(node, values)
    if values.batch_size is not None:
        if batch % values.batch_size:
            return None
        lengths[batch // values.batch_size * values.count :] = 0
    is_real = np.arange(steps)[:, None] < lengths
    return inputs if is_real.all() else inputs[is_real]


def data(node: Any, values: RunValues, directions: int) -> Array:
    """The inputs of each step, repeated on the last axis for each direction."""
    inputs = values[input_of(node, DATA)]
    return inputs if directions == 1 else np.concatenate([inputs] * directions, axis=-1)


def states(node: Any, values: RunValues) -> Array:
    """The state before each step, with the directions side by side on the last axis."""
    after = values[output_of(node, 0)]
    steps, directions, batch, size = after.shape
    first = np.zeros((directions, batch, size), np.float32)
    if name := input_of(node, FIRST):
        first = values[name]
    before = np.empty((steps, batch, directions, size), np.float32)
    for number in range(directions):
        is_back = number == 1 or get_attribute(node, "direction", "forward") == "reverse"
        shifted = _backward if is_back else _forward
        before[:, :, number] = shifted(after[:, number], first[number], _lengths(node, values))
    return before.reshape(steps, batch, directions * size)


def _forward(after: Array, first: Array, _: NDArray[np.int64]) -> Array:
    return np.concatenate([first[None], after[:-1]])


def _backward(after: Array, first: Array, lengths: NDArray[np.int64]) -> Array:
    """The states of the backward direction, where the initial state stands before the last step of each sequence."""
    before = np.concatenate([after[1:], first[None]])
    before[lengths - 1, np.arange(len(lengths))] = first
    return before


def _lengths(node: Any, values: RunValues) -> NDArray[np.int64]:
    name = input_of(node, LENGTHS)
    steps, batch = values[input_of(node, DATA)].shape[:2]
    return np.array(values[name], np.int64) if name else np.full(batch, steps, np.int64)


def recurrent(site: WeightSite) -> InputCapture | None:
    """The inputs of a kernel or recurrent kernel; each direction is a group of its own."""
    node = site.node
    if len(site.shape) != 3 or get_attribute(node, "layout", 0):
        return None
    use = WeightUse(site.order[1], site.order[2], site.shape[0], site.order[0])
    if site.input == KERNEL:
        return _of_data(site, use)
    if site.input == RECURRENT:
        is_reset = node.op_type == "GRU" and not get_attribute(node, "linear_before_reset", 0)
        return _of_reset(site, use) if is_reset else _of_states(site, use)
    return None


def _of_data(site: WeightSite, use: WeightUse) -> InputCapture:
    def compute(values: RunValues) -> Inputs:
        yield from _real_steps(site, values, data(site.node, values, use.groups), use)

    return InputCapture(present_inputs(site.node, DATA, LENGTHS), compute)


def _of_states(site: WeightSite, use: WeightUse) -> InputCapture:
    def compute(values: RunValues) -> Inputs:
        yield from _real_steps(site, values, states(site.node, values), use)

    return InputCapture(_needed(site), compute)


def _of_reset(site: WeightSite, use: WeightUse) -> InputCapture | None:
    """The inputs of the recurrent kernel of a GRU whose candidate gate reads the state multiplied by the reset gate."""
    node = site.node
    activations = get_attribute(node, "activations", ("Sigmoid",))
    is_plain = use.groups == 1 and activations[0] == "Sigmoid" and get_attribute(node, "clip", 0.0) == 0.0
    if not is_plain:
        return None
    rows, size = site.shape[1:]

    def compute(values: RunValues) -> Inputs:
        before = states(node, values)
        yield from _real_steps(site, values, before, replace(use, outputs=(0, rows - size)))
        reset_state = before * _reset(site, values, before)
        yield from _real_steps(site, values, reset_state, replace(use, outputs=(rows - size, rows)))

    return InputCapture((*_needed(site), *present_inputs(node, KERNEL, RECURRENT, BIAS)), compute)


def _reset(site: WeightSite, values: RunValues, before: Array) -> Array:
    """The activations of the reset gate, the second of three."""
    node, size = site.node, site.shape[2]
    gate = slice(size, 2 * size)
    kernel, recurrent = (values[input_of(node, index)][0, gate] for index in (KERNEL, RECURRENT))
    total: Array = values[input_of(node, DATA)] @ kernel.T + before @ recurrent.T
    if name := input_of(node, BIAS):
        total = total + values[name][0].reshape(6, size)[[1, 4]].sum(axis=0)
    # A sigmoid by means of tanh, which does not overflow.
    activations: Array = (1 + np.tanh(total / 2)) / 2
    return activations


def _needed(site: WeightSite) -> tuple[str, ...]:
    known = present_inputs(site.node, DATA, LENGTHS, FIRST)
    return (*known, output_of(site.node, 0))


def _real_steps(site: WeightSite, values: RunValues, inputs: Array, use: WeightUse) -> Inputs:
    real_inputs = drop_padded_steps(site.node, values, inputs)
    if real_inputs is not None:
        yield real_inputs, use


def gemm(site: WeightSite) -> InputCapture | None:
    """The inputs of a matrix in a Gemm, which may transpose its operands and scale the product."""
    node = site.node
    if site.input > 1 or len(site.shape) != 2 or _is_mixed(node):
        return None
    trans_a, trans_b = bool(get_attribute(node, "transA", 0)), bool(get_attribute(node, "transB", 0))
    is_right = site.input == 1
    # The features of the data must be on its last axis: data on the right of a weight has them first.
    in_axis = int(trans_b) if is_right else 1 - int(trans_a)
    is_transposed = trans_a if is_right else not trans_b
    use = WeightUse(out_axis=site.order[1 - in_axis], in_axis=site.order[in_axis])
    data, scale = input_of(node, 1 - site.input), get_attribute(node, "alpha", 1.0)

    def compute(values: RunValues) -> Inputs:
        inputs = _transposed(values[data]) if is_transposed else values[data]
        # Scaling the product is the same as scaling the inputs.
        yield from _real(values, inputs if scale == 1.0 else inputs * np.float32(scale), use)

    return InputCapture((data,), compute)


def matmul(site: WeightSite) -> InputCapture | None:
    """The inputs of a matrix in a MatMul, or of a stack of matrices, each with its own inputs."""
    is_right = site.input == 1
    data, rank = input_of(site.node, 1 - site.input), len(site.shape)
    if rank not in {2, 3}:
        return None
    in_axis, out_axis = (rank - 2, rank - 1) if is_right else (rank - 1, rank - 2)
    groups = site.shape[0] if rank == 3 else 1
    group_axis = site.order[0] if rank == 3 else None
    use = WeightUse(site.order[out_axis], site.order[in_axis], groups, group_axis)

    def compute(values: RunValues) -> Inputs:
        inputs = values[data] if is_right or values[data].ndim == 1 else _transposed(values[data])
        yield from _real(values, inputs if groups == 1 else _side_by_side(inputs, groups), use)

    return InputCapture((data,), compute)


def _is_mixed(node: Any) -> bool:
    """Whether a FusedMatMul also swaps a batch axis with the rows."""
    return bool(get_attribute(node, "transBatchA", 0) or get_attribute(node, "transBatchB", 0))


def _transposed(inputs: Array) -> Array:
    return np.swapaxes(inputs, -1, -2)


def _side_by_side(inputs: Array, groups: int) -> Array:
    """The inputs of all matrices of a stack, side by side on one feature axis."""
    stacked = np.broadcast_to(inputs, (*inputs.shape[:-3], groups, *np.atleast_2d(inputs).shape[-2:]))
    rows, features = stacked.shape[-2:]
    return np.moveaxis(stacked, -3, -2).reshape(*stacked.shape[:-3], rows, groups * features)


def _real(values: RunValues, inputs: Array, use: WeightUse) -> Inputs:
    real_inputs = values.real(inputs, inputs.ndim - 1)
    if real_inputs is not None:
        yield real_inputs, use


Pads = tuple[tuple[int, int], ...]
_SAME = ("SAME_UPPER", "SAME_LOWER")


def convolution(site: WeightSite) -> InputCapture | None:
    """The inputs of the kernel of a convolution or a transposed convolution."""
    node, space = site.node, site.order[2:]
    # WeightUse names no order of the spatial axes: they must have the order of the tensor.
    if site.input != 1 or not space or list(space) != sorted(space):
        return None
    data, kernel = input_of(node, 0), site.shape[2:]
    ones = (1,) * len(kernel)
    strides, dilations = get_attribute(node, "strides", ones), get_attribute(node, "dilations", ones)
    extents = tuple((size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True))
    groups, is_transposed = get_attribute(node, "group", 1), node.op_type == "ConvTranspose"
    out_axis, in_axis = (1, 0) if is_transposed else (0, 1)

    def compute(values: RunValues) -> Inputs:
        inputs = values.real(values[data], 1)
        if inputs is None:
            return
        pads_of = _cropped if is_transposed else _padded
        pads = pads_of(node, inputs.shape[2:], extents, strides)
        window = SlidingWindow(strides, dilations, pads, is_transposed)
        yield inputs, WeightUse(site.order[out_axis], site.order[in_axis], groups, window=window)

    return InputCapture((data,), compute)


def _padded(node: Any, image: Sequence[int], extents: Sequence[int], strides: Sequence[int]) -> Pads:
    """The numbers of zeros before and after each spatial axis of the inputs."""
    padding = get_attribute(node, "auto_pad", "NOTSET")
    if padding not in _SAME:
        return _explicit(node, len(image), padding)
    pads = []
    for length, extent, stride in zip(image, extents, strides, strict=True):
        total = max(0, (-(-length // stride) - 1) * stride + extent - length)
        pads.append(_shared(total, is_more_behind=padding == "SAME_UPPER"))
    return tuple(pads)


def _cropped(node: Any, image: Sequence[int], extents: Sequence[int], strides: Sequence[int]) -> Pads:
    """The lengths cropped before and after each spatial axis of the full outputs; negative where zeros are added."""
    padding, axes = get_attribute(node, "auto_pad", "NOTSET"), len(image)
    added = get_attribute(node, "output_padding", (0,) * axes)
    output_shape = get_attribute(node, "output_shape", ())[-axes:]
    if not output_shape and padding not in _SAME:
        explicit = zip(_explicit(node, axes, padding), added, strict=True)
        return tuple((before, after - more) for (before, after), more in explicit)
    pads = []
    for axis, (length, extent, stride) in enumerate(zip(image, extents, strides, strict=True)):
        full = (length - 1) * stride + extent
        total = full + added[axis] - (output_shape[axis] if output_shape else length * stride)
        before, after = _shared(max(0, total), is_more_behind=padding == "SAME_UPPER")
        pads.append((before, full - output_shape[axis] - before if output_shape else after - added[axis]))
    return tuple(pads)


def _explicit(node: Any, axes: int, padding: str) -> Pads:
    pads = get_attribute(node, "pads", (0,) * 2 * axes) if padding != "VALID" else (0,) * 2 * axes
    return tuple(zip(pads[:axes], pads[axes:], strict=True))


def _shared(total: int, *, is_more_behind: bool) -> tuple[int, int]:
    less = total // 2
    return (less, total - less) if is_more_behind else (total - less, less)


_Rule = Callable[[WeightSite], InputCapture | None]

_STANDARD: Mapping[str, _Rule] = {
    "Conv": convolution,
    "ConvTranspose": convolution,
    "Gemm": gemm,
    "MatMul": matmul,
    "LSTM": recurrent,
    "GRU": recurrent,
    "RNN": recurrent,
}
_MICROSOFT: Mapping[str, _Rule] = {"FusedConv": convolution, "FusedGemm": gemm, "FusedMatMul": gemm}
"""The fused operators in models that onnxruntime optimised and saved."""


def capture_rule(site: WeightSite) -> InputCapture | None:
    """How to get the inputs of a tensor at a site; None if there is no rule for the operator."""
    rules = _STANDARD if site.node.domain in STANDARD_DOMAINS else {}
    rule = (_MICROSOFT if site.node.domain == "com.microsoft" else rules).get(site.node.op_type)
    return rule(site) if rule is not None else None
