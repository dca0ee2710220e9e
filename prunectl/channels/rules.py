"""Label propagation: how each kind of operation maps the labels of its inputs to those of its outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum

import numpy as np

from prunectl.channels.graph import ChannelGraph, OpKind, OpNode
from prunectl.channels.labels import AxisRole, LabelArray, LabelTrace, fixed, op_title, spread


def elementwise(trace: LabelTrace, node: OpNode) -> None:
    """Unite the labels of operands that are added, multiplied or compared, and record the weights among them."""
    shape = trace.shape(node.outputs[0])
    names = [name for name in node.inputs if name]
    values = [_aligned(trace.labels_of(name), len(shape)) for name in names if name not in trace.graph.views]
    joined = _joined(trace, node, values, shape)
    for name in names:
        if name in trace.graph.views:
            _label_weight(trace, node, name, joined)
    for name in node.outputs:
        trace.values[name] = joined


def _joined(trace: LabelTrace, node: OpNode, values: list[LabelArray], shape: tuple[int, ...]) -> LabelArray:
    """The united labels of the operands, which are those of the result."""
    kept = values
    for axis in (axis for axis, length in enumerate(shape) if length > 1):
        if any(trace.labels.varies(value, axis) for value in kept):
            # A channel that is broadcast to all channels of an axis must be kept.
            for value in kept:
                if value.shape[axis] == 1:
                    trace.labels.lock(value, f"{op_title(node)} broadcasts this channel to many channels")
            kept = [value for value in kept if value.shape[axis] > 1]
    expanded = [np.broadcast_to(value, shape) for value in kept]
    for other in expanded[1:]:
        trace.labels.unite(expanded[0], other, f"{op_title(node)} ties these channels to others that cannot be removed")
    labelled = [value for value in expanded if value.any()]
    return next(iter(labelled), fixed(shape))


def _label_weight(trace: LabelTrace, node: OpNode, name: str, labels: LabelArray) -> None:
    """Note a weight that has an index for each channel on one of its axes."""
    shape = trace.shape(name)
    offset = labels.ndim - len(shape)
    axes = [axis for axis, length in enumerate(shape) if length > 1 and trace.labels.varies(labels, axis + offset)]
    if not axes:
        return
    line = trace.labels.along(labels, axes[0] + offset)
    if line is None:
        trace.labels.lock(labels, f"{op_title(node)} mixes channels with positions")
    else:
        trace.record_axis(node, name, axes[0], AxisRole.OTHER, line)


def _aligned(labels: LabelArray, rank: int) -> LabelArray:
    return labels.reshape((1,) * (rank - labels.ndim) + labels.shape)


_DATA, _KERNELS, _BIASES = slice(0, 3), slice(3, 6), slice(7, 10)
_OUT, _OUT_BIAS = 6, 10


def attention(trace: LabelTrace, node: OpNode) -> None:
    """Read the channels on the last axes of query, value and key, and make new ones; heads are channels in between."""
    kernel, bias, *masks = node.inputs[_OUT], node.inputs[_OUT_BIAS], *node.inputs[_OUT_BIAS + 1 :]
    heads = trace.labels.fresh(trace.shape(kernel)[0])
    for data, weight in zip(node.inputs[_DATA], node.inputs[_KERNELS], strict=True):
        trace.record_axis(node, weight, 0, AxisRole.IN, trace.labels_along(node, trace.labels_of(data), -1))
        trace.record_axis(node, weight, 1, AxisRole.OUT, heads)
    for weight in filter(None, node.inputs[_BIASES]):
        trace.record_axis(node, weight, 0, AxisRole.BIAS, heads)
    for mask in masks:
        trace.labels.lock(trace.labels_of(mask), f"{op_title(node)} computes its mask")
    shape = trace.shape(node.outputs[0])
    produced = trace.labels.fresh(shape[-1])
    trace.record_axis(node, kernel, 0, AxisRole.IN, heads)
    trace.record_axis(node, kernel, 2, AxisRole.OUT, produced)
    if bias:
        trace.record_axis(node, bias, 0, AxisRole.BIAS, produced)
    trace.values[node.outputs[0]] = spread(produced, len(shape) - 1, shape)


def concat(trace: LabelTrace, node: OpNode) -> None:
    """Concatenate labels; if channels lie on another axis than that of the concatenation, unite them instead."""
    shape = trace.shape(node.outputs[0])
    axis = node.attributes["axis"] % len(shape)
    arrays = [trace.labels_of(name) for name in node.inputs]
    across = [array for array in arrays if set(trace.labels.varying(array)) - {axis}]
    if not across:
        # Labels do not differ along the other axes: one position is enough.
        first = tuple(slice(None) if number == axis else slice(0, 1) for number in range(len(shape)))
        trace.values[node.outputs[0]] = np.broadcast_to(np.concatenate([array[first] for array in arrays], axis), shape)
        return
    if any(trace.labels.varies(array, axis) for array in arrays):
        for array in arrays:
            trace.labels.lock(array, op_title(node))
        trace.values[node.outputs[0]] = fixed(shape)
        return
    heads = [first_along(array, axis) for array in arrays]
    for head in heads[1:]:
        trace.labels.unite(heads[0], head, f"{op_title(node)} ties these channels to others that cannot be removed")
    trace.values[node.outputs[0]] = np.broadcast_to(next((head for head in heads if head.any()), heads[0]), shape)


def split(trace: LabelTrace, node: OpNode) -> None:
    """Split labels like the data."""
    labels, axis = trace.labels_of(node.inputs[0]), node.attributes["axis"]
    bounds = np.cumsum(node.attributes["sizes"])[:-1]
    for name, piece in zip(node.outputs, np.split(labels, bounds, axis), strict=True):
        trace.values[name] = piece


def slice_axes(trace: LabelTrace, node: OpNode) -> None:
    """Slice labels like the data; a step other than 1 over channels locks them."""
    labels = trace.labels_of(node.inputs[0])
    for axis, start, stop, step in node.attributes["slices"]:
        if step != 1 and trace.labels.varies(labels, axis):
            trace.labels.lock(labels, f"{op_title(node)} reorders channels")
            trace.values[node.outputs[0]] = fixed(trace.shape(node.outputs[0]))
            return
        piece = slice(start, None if stop < 0 else stop, step)
        labels = labels[(slice(None),) * axis + (piece,)]
    trace.values[node.outputs[0]] = labels


def transpose(trace: LabelTrace, node: OpNode) -> None:
    """Permute the axes of labels."""
    trace.values[node.outputs[0]] = trace.labels_of(node.inputs[0]).transpose(node.attributes["order"])


def along_axes(trace: LabelTrace, node: OpNode) -> None:
    """Change the lengths of axes or remove them, as pooling, padding and upsampling do; lock channels on these axes."""
    labels, shape = trace.labels_of(node.inputs[0]), trace.shape(node.outputs[0])
    axes = {axis % labels.ndim for axis in node.attributes["axes"]}
    if any(trace.labels.varies(labels, axis) for axis in axes):
        # Most classifiers end in a softmax; users expect the reason that its classes are outputs of the network.
        is_last = any(name in trace.graph.outputs for name in node.outputs)
        reason = "is an output of the network" if is_last else "spans several channels"
        trace.labels.lock(labels, f"{op_title(node)} {reason}")
        for name in node.outputs:
            trace.values[name] = fixed(trace.graph.shapes.get(name, ()))
        return
    for axis in axes:
        labels = first_along(labels, axis)
    if len(shape) < labels.ndim:
        labels = labels.reshape(tuple(length for axis, length in enumerate(labels.shape) if axis not in axes))
    for name in node.outputs:
        trace.values[name] = np.broadcast_to(labels, shape)


def first_along(labels: LabelArray, axis: int) -> LabelArray:
    """The labels at the first position of an axis, which keeps length 1."""
    return labels[tuple(slice(0, 1) if number == axis % labels.ndim else slice(None) for number in range(labels.ndim))]


class ChannelAxis(StrEnum):
    """The axis of an operand of a matrix product on which its channels lie."""

    NONE = "none"
    FRONT = "front"
    """A batch axis: one channel is a whole matrix, such as a head of an attention."""
    KEPT = "kept"
    """The matrix axis that the product keeps."""
    SUMMED = "summed"
    """The matrix axis that the product sums over."""
    SEVERAL = "several"


def matmul(trace: LabelTrace, node: OpNode) -> None:
    """Unite the channels of both operands that are summed over, or whose matrices are multiplied with each other."""
    shape = trace.shape(node.outputs[0])
    values = [_aligned(trace.labels_of(name), len(shape)) for name in node.inputs]
    if min(len(trace.shape(name)) for name in node.inputs) < 2:
        _lock_product(trace, node, *values)
        return
    left, right = values
    # In both, the axis that is summed over is the last.
    operands = (left, right.swapaxes(-1, -2))
    sides = [_channel_axis(trace, value) for value in operands]
    match sides:
        case [ChannelAxis.SUMMED, ChannelAxis.SUMMED]:
            left_row, right_row = (first_along(value, -2) for value in operands)
            trace.labels.unite(left_row, right_row, op_title(node))
            trace.values[node.outputs[0]] = fixed(shape)
        case [ChannelAxis.FRONT, ChannelAxis.FRONT]:
            _unite_fronts(trace, node, left, right)
            trace.values[node.outputs[0]] = np.broadcast_to(left[..., :1, :1], shape)
        case [ChannelAxis.FRONT | ChannelAxis.KEPT, ChannelAxis.NONE]:
            _unite_fronts(trace, node, left, right)
            trace.values[node.outputs[0]] = np.broadcast_to(first_along(left, -1), shape)
        case [ChannelAxis.NONE, ChannelAxis.FRONT | ChannelAxis.KEPT]:
            _unite_fronts(trace, node, left, right)
            trace.values[node.outputs[0]] = np.broadcast_to(first_along(right, -2), shape)
        case _:
            _lock_product(trace, node, left, right)


def _channel_axis(trace: LabelTrace, value: LabelArray) -> ChannelAxis:
    axes = trace.labels.varying(value)
    named = {value.ndim - 1: ChannelAxis.SUMMED, value.ndim - 2: ChannelAxis.KEPT}
    sides = {named.get(axis, ChannelAxis.FRONT) for axis in axes}
    return sides.pop() if len(sides) == 1 else ChannelAxis.SEVERAL if sides else ChannelAxis.NONE


def _unite_fronts(trace: LabelTrace, node: OpNode, left: LabelArray, right: LabelArray) -> None:
    """Unite the channels on the batch axes of both operands, unless one operand is broadcast along these axes."""
    left_fronts, right_fronts = left[..., 0, 0], right[..., 0, 0]
    axes = {*trace.labels.varying(left_fronts), *trace.labels.varying(right_fronts)}
    if any(left_fronts.shape[axis] > 1 and right_fronts.shape[axis] > 1 for axis in axes):
        trace.labels.unite(left_fronts, right_fronts, op_title(node))


def _lock_product(trace: LabelTrace, node: OpNode, *values: LabelArray) -> None:
    for value in values:
        trace.labels.lock(value, f"{op_title(node)} multiplies these channels by a computed value")
    trace.values[node.outputs[0]] = fixed(trace.shape(node.outputs[0]))


def recurrent(trace: LabelTrace, node: OpNode) -> None:
    """Read the channels of the last axis and the units of the previous step, and make units."""
    data, kernel, recurrent_kernel, *biases_and_states = node.inputs
    units, gates = node.attributes["units"], node.attributes["gates"]
    units_labels = trace.labels.fresh(units)
    trace.record_axis(node, kernel, -2, AxisRole.OUT, np.tile(units_labels, gates))
    trace.record_axis(node, kernel, -1, AxisRole.IN, trace.labels_along(node, trace.labels_of(data), -1))
    trace.record_axis(node, recurrent_kernel, -2, AxisRole.OUT, np.tile(units_labels, gates))
    trace.record_axis(node, recurrent_kernel, -1, AxisRole.IN, units_labels)
    for name in filter(None, biases_and_states):
        _bias_or_state(trace, node, name, units_labels)
    for name in node.outputs:
        shape = trace.shape(name)
        trace.values[name] = spread(units_labels, len(shape) - 1, shape)


def _bias_or_state(trace: LabelTrace, node: OpNode, name: str, units_labels: LabelArray) -> None:
    if name not in trace.graph.views:
        trace.labels.unite(_last(trace.labels_of(name)), units_labels, f"{op_title(node)} starts from a computed state")
        return
    times = trace.shape(name)[-1] // len(units_labels)
    # An initial state has the role of a bias: the equivalence check must zero it too, so that a zeroed unit stays at 0.
    trace.record_axis(node, name, -1, AxisRole.BIAS, np.tile(units_labels, times))


def _last(labels: LabelArray) -> LabelArray:
    return np.array(labels.reshape(-1, labels.shape[-1])[0])


_FUSED = frozenset({2, 3})
"""The length of an axis that separates queries, keys and values of a fused matrix (3), or keys and values (2)."""


def reshape(trace: LabelTrace, node: OpNode) -> None:
    """Reshape labels; where that splits an axis of channels, unite them to blocks, so that both shapes stay regular."""
    labels, shape = trace.labels_of(node.inputs[0]), trace.shape(node.outputs[0])
    reshaped = np.reshape(labels, shape)
    axes = trace.labels.varying(reshaped)
    if len(axes) > 1 and len(trace.labels.varying(labels)) == 1:
        kept_axis = _kept_axis(trace, node, axes, shape)
        for axis in axes:
            if axis != kept_axis:
                trace.labels.unite(reshaped, reshaped.take([0], axis=axis), op_title(node))
    varying = trace.labels.varying(reshaped)
    if max(len(trace.labels.varying(labels)), len(varying)) > 1 or (axes and not varying):
        trace.labels.lock(labels, f"{op_title(node)} splits channels")
        reshaped = np.array(fixed(shape))
    trace.values[node.outputs[0]] = reshaped


def _kept_axis(trace: LabelTrace, node: OpNode, axes: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """The one of the new axes along which channels still differ.

    In a channel shuffle it is the last, as each group must keep the same number. Otherwise it is that of whole blocks,
    such as the heads of an attention.
    """
    if _is_shuffle(trace, node):
        return axes[-1]
    heads = [axis for axis in axes[:-1] if len(axes) == 2 or shape[axis] not in _FUSED]
    return heads[0] if heads else axes[0]


def _is_shuffle(trace: LabelTrace, node: OpNode) -> bool:
    """Whether a reshape starts a channel shuffle: only transposes read it, and what follows restores the shape."""
    readers = trace.readers(node)
    if not readers or any(reader.kind is not OpKind.TRANSPOSE for reader in readers):
        return False
    reshapes = [after for reader in readers for after in trace.readers(reader)]
    before = trace.shape(node.inputs[0])
    return bool(reshapes) and all(
        after.kind is OpKind.RESHAPE and trace.graph.shapes.get(after.outputs[0]) == before for after in reshapes
    )


def convolution(trace: LabelTrace, node: OpNode) -> None:
    """Read the channels on axis 1, and make new ones; a depthwise convolution passes its channels on."""
    labels, shape = trace.labels_of(node.inputs[0]), trace.shape(node.outputs[0])
    if not trace.is_view(node, 1):
        lock_all(trace, node, " computes its weights")
        return
    groups, is_transposed = node.attributes["groups"], node.attributes["is_transposed"]
    kernel, inputs = node.inputs[1], trace.labels_along(node, labels, 1)
    in_axis, out_axis = (0, 1) if is_transposed else (1, 0)
    if groups > 1 and groups == len(inputs):
        produced = np.repeat(inputs, shape[1] // groups)
        # Axis 0 of a depthwise kernel counts the groups, and so both input and output channels.
        trace.record_axis(node, kernel, 0, AxisRole.OUT, inputs if is_transposed else produced)
    else:
        per_group = inputs.reshape(groups, -1)
        for others in per_group[1:]:
            trace.labels.unite(per_group[0], others, op_title(node))
        fresh = trace.labels.fresh(shape[1] // groups)
        produced = np.tile(fresh, groups)
        trace.record_axis(node, kernel, out_axis, AxisRole.OUT, fresh if is_transposed else produced)
        trace.record_axis(node, kernel, in_axis, AxisRole.IN, inputs if is_transposed else per_group[0])
    _bias(trace, node, produced)
    _lock_activated(trace, node, produced)
    trace.values[node.outputs[0]] = spread(produced, 1, shape)


def _lock_activated(trace: LabelTrace, node: OpNode, produced: LabelArray) -> None:
    """Lock the output channels of an operation if its attribute `lock` gives a reason, such as a fused activation."""
    if reason := node.attributes.get("lock"):
        trace.labels.lock(produced, f"{op_title(node)} {reason}")


def linear(trace: LabelTrace, node: OpNode) -> None:
    """Read the channels on the last axis, and make new ones."""
    labels, shape = trace.labels_of(node.inputs[0]), trace.shape(node.outputs[0])
    if not trace.is_view(node, 1):
        lock_all(trace, node, " computes its weights")
        return
    in_axis = node.attributes["in_axis"]
    inputs = trace.labels_along(node, labels, -1)
    produced = trace.labels.fresh(shape[-1])
    trace.record_axis(node, node.inputs[1], 1 - in_axis, AxisRole.OUT, produced)
    trace.record_axis(node, node.inputs[1], in_axis, AxisRole.IN, inputs)
    _bias(trace, node, produced)
    _lock_activated(trace, node, produced)
    trace.values[node.outputs[0]] = spread(produced, len(shape) - 1, shape)


def embedding(trace: LabelTrace, node: OpNode) -> None:
    """Make channels on the last axis; the rows of the table are tokens, which are never removed."""
    shape = trace.shape(node.outputs[0])
    trace.labels.lock(trace.labels_of(node.inputs[1]), op_title(node))
    produced = trace.labels.fresh(shape[-1])
    table = node.inputs[0]
    trace.record_axis(node, table, 1, AxisRole.OUT, produced)
    trace.record_axis(node, table, 0, AxisRole.OTHER, np.array(fixed((trace.shape(table)[0],))))
    trace.values[node.outputs[0]] = spread(produced, len(shape) - 1, shape)


def channel_norm(trace: LabelTrace, node: OpNode) -> None:
    """Scale and shift each channel by itself."""
    labels = trace.labels_of(node.inputs[0])
    line = trace.labels_along(node, labels, 1)
    for position, role in enumerate((AxisRole.SCALE, AxisRole.SHIFT, AxisRole.STATE, AxisRole.STATE), 1):
        if trace.is_view(node, position):
            trace.record_axis(node, node.inputs[position], 0, role, line)
        elif position < len(node.inputs) and node.inputs[position]:
            trace.labels.lock(labels, f"{op_title(node)} computes its weights")
    trace.values[node.outputs[0]] = labels


def _bias(trace: LabelTrace, node: OpNode, produced: LabelArray) -> None:
    if len(node.inputs) < 3 or not node.inputs[2]:
        return
    name = node.inputs[2]
    if not trace.is_view(node, 2):
        trace.labels.lock(produced, f"{op_title(node)} computes its bias")
        return
    shape = trace.shape(name)
    if shape and shape[-1] == len(produced) and len(shape) == sum(length == 1 for length in shape[:-1]) + 1:
        trace.record_axis(node, name, len(shape) - 1, AxisRole.BIAS, produced)
    elif any(length > 1 for length in shape):
        trace.labels.lock(produced, f"{op_title(node)} has a bias that is not one number per channel")


Rule = Callable[[LabelTrace, OpNode], None]


def lock_all(trace: LabelTrace, node: OpNode, why: str = "") -> None:
    """Lock all channels that an unknown operation reads."""
    for name in node.inputs:
        trace.labels.lock(trace.labels_of(name), op_title(node) + why)
    for name in node.outputs:
        trace.values[name] = fixed(trace.graph.shapes.get(name, ()))


RULES: Mapping[OpKind, Rule] = {
    OpKind.CONVOLUTION: convolution,
    OpKind.LINEAR: linear,
    OpKind.EMBEDDING: embedding,
    OpKind.MATMUL: matmul,
    OpKind.RECURRENT: recurrent,
    OpKind.ATTENTION: attention,
    OpKind.CHANNEL_NORM: channel_norm,
    OpKind.ELEMENTWISE: elementwise,
    OpKind.CONCAT: concat,
    OpKind.SPLIT: split,
    OpKind.SLICE: slice_axes,
    OpKind.TRANSPOSE: transpose,
    OpKind.RESHAPE: reshape,
    OpKind.ALONG_AXES: along_axes,
    OpKind.UNKNOWN: lock_all,
}


def propagate(graph: ChannelGraph) -> LabelTrace:
    """Propagate labels through a network, from its inputs to its outputs."""
    trace = LabelTrace(graph)
    for node in graph.nodes:
        RULES[node.kind](trace, node)
    for name in graph.outputs:
        trace.labels.lock(trace.labels_of(name), f"{name} is an output of the network")
    trace.unify_shared()
    return trace
