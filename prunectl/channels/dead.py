"""Dead channels: those that nothing reads, and constant ones, which are folded into the biases of their readers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from prunectl.channels.adapter import GraphAdapter
from prunectl.channels.graph import OpKind, OpNode
from prunectl.channels.groups import ChannelGroup, PrunedGroup
from prunectl.channels.labels import AxisRole, LabelTrace
from prunectl.formats.base import Array
from prunectl.pruning.plan import SkippedTensor

_INPUTS = 2
"""The number of random batches: a value is constant if it is the same for all of them."""
_CLOSE = 1e-5
"""The largest difference of values that count as equal, relative to the largest output."""


def fold_into_bias(
    adapter: GraphAdapter,
    trace: LabelTrace,
    node: OpNode,
    *,
    weight_axis: tuple[str, int],
    indices: Sequence[int],
    weights: dict[str, Array],
) -> bool:
    """Fold constant inputs of a layer into its bias, and zero the weights that read them; False if that is impossible.

    `weights` holds the weights that earlier folds changed; this fold updates it.
    """
    if node.outputs[0] not in adapter.observable:
        return False
    name, axis = weight_axis
    kernel = np.array(weights.get(name, adapter.graph.weights[name]))
    np.moveaxis(kernel, axis, 0)[list(indices)] = 0
    difference, scale = _difference(adapter, node, weights, {**weights, name: kernel})
    constant = _constant(node, difference, scale)
    if constant is None or (constant.any() and not _absorb(trace, node, constant, weights)):
        return False
    weights[name] = kernel
    return True


def _difference(
    adapter: GraphAdapter, node: OpNode, before: dict[str, Array], after: dict[str, Array]
) -> tuple[Array, float]:
    """The change of a node's outputs between two sets of weights, random batches first; and the largest |output|."""
    runners = [adapter.runner(adapter.with_weights(weights), node.outputs[:1]) for weights in (before, after)]
    random = np.random.default_rng(0)
    batches = [adapter.random_inputs(random) for _ in range(_INPUTS)]
    first, second = (np.stack([np.asarray(run(feeds)[-1], np.float64) for feeds in batches]) for run in runners)
    return first - second, float(np.abs(first).max(initial=0.0)) or 1.0


def _constant(node: OpNode, difference: Array, scale: float) -> Array | None:
    """One constant for each output channel; None if the difference depends on the input data or the position."""
    # The first axis counts the batches, so that the channel axis 1 of a convolution is axis 2 here.
    axis = 2 if node.kind is OpKind.CONVOLUTION else difference.ndim - 1
    rows = np.moveaxis(difference, axis, 0).reshape(difference.shape[axis], -1)
    if node.kind is OpKind.RECURRENT:
        # Gates and activations follow its sums, so that a constant cannot be added to its outputs: only zero is folded.
        return np.zeros(len(rows)) if np.abs(rows).max(initial=0.0) <= _CLOSE * scale else None
    if np.ptp(rows, axis=1).max(initial=0.0) > _CLOSE * scale:
        return None
    constants: Array = rows.mean(axis=1)
    return constants if np.abs(constants).max(initial=0.0) > _CLOSE * scale else np.zeros_like(constants)


def _absorb(trace: LabelTrace, node: OpNode, constant: Array, weights: dict[str, Array]) -> bool:
    """Add a constant to the bias or to a weight that is added next, or subtract it from the mean of the next norm."""
    if trace.is_view(node, 2):
        return _add_to_weight(trace, node.inputs[2], constant, weights)
    reader, axis, is_transposed = _single_consumer(trace, node)
    if reader is None:
        return False
    if reader.kind is OpKind.CHANNEL_NORM and trace.is_view(reader, 3) and axis == 1:
        return _add_to_weight(trace, reader.inputs[3], -constant, weights)
    if not is_transposed and reader.kind is OpKind.ELEMENTWISE and reader.op.lower() == "add":
        weight_inputs = [name for name in reader.inputs if name in trace.graph.views]
        return len(weight_inputs) == 1 and _add_to_weight(trace, weight_inputs[0], constant, weights)
    return False


def _single_consumer(trace: LabelTrace, node: OpNode) -> tuple[OpNode | None, int, bool]:
    """The only operation that reads an output, apart from transposes; the channel axis there, and if transposed."""
    axis = 1 if node.kind is OpKind.CONVOLUTION else len(trace.shape(node.outputs[0])) - 1
    is_transposed = False
    while len(readers := trace.readers(node)) == 1:
        (node,) = readers
        if node.kind is not OpKind.TRANSPOSE:
            return node, axis, is_transposed
        axis, is_transposed = list(node.attributes["order"]).index(axis), True
    return None, axis, is_transposed


def _add_to_weight(trace: LabelTrace, name: str, constant: Array, weights: dict[str, Array]) -> bool:
    tensor = trace.graph.views[name].tensor
    array = weights.get(tensor, trace.graph.weights[tensor])
    if array.size != constant.size or trace.graph.uses[tensor] != 1:
        return False
    weights[tensor] = (array.astype(np.float64) + constant.reshape(array.shape)).astype(array.dtype)
    return True


@dataclass(frozen=True, slots=True)
class DeadChannels:
    """Dead channels, and the weights that absorb their constants."""

    pruned_groups: tuple[PrunedGroup, ...]
    skips: tuple[SkippedTensor, ...]
    weights: Mapping[str, Array]
    """The new values of weights that read these channels or absorb their constants."""


def find_dead(
    adapter: GraphAdapter, trace: LabelTrace, groups: Sequence[ChannelGroup], selected: Sequence[ChannelGroup]
) -> DeadChannels:
    """Find the dead channels of the selected groups, and fold their constants into the layers that read them.

    A channel whose contribution is not constant, as at borders that are padded, is kept and listed in `skips`.
    """
    weights = adapter.graph.weights
    zero_consumed = _zero_channels(selected, AxisRole.IN, weights)
    zero_produced = _zero_channels(selected, AxisRole.OUT, weights) - zero_consumed
    skips: list[SkippedTensor] = []
    while True:
        folded, blocked = _fold_all(adapter, trace, groups, zero_produced)
        if not blocked:
            break
        for reader, labels in blocked:
            skips.append(SkippedTensor(reader, "no bias can absorb its constant input channels"))
            zero_produced -= labels
    dead = zero_consumed | zero_produced
    return DeadChannels(tuple(_pruned_group(group, dead) for group in selected), tuple(skips), folded)


def _pruned_group(group: ChannelGroup, dead: set[int]) -> PrunedGroup:
    dropped = [number for number, label in enumerate(group.labels.tolist()) if label in dead]
    # A group must keep at least one channel: a tensor with an axis of length 0 is useless.
    return PrunedGroup(group, tuple(dropped if len(dropped) < len(group) else dropped[1:]))


def _zero_channels(groups: Iterable[ChannelGroup], role: AxisRole, weights: Mapping[str, Array]) -> set[int]:
    """The labels of channels whose weights are all zero on the axes with this role, of which there is at least one."""
    labels: set[int] = set()
    for group in groups:
        axes = [(axis, slices) for axis, slices in zip(group.axes, group.slices, strict=True) if axis.role is role]
        is_zero = np.full(len(group), bool(axes))
        for axis, slices in axes:
            rows = np.moveaxis(weights[axis.tensor], axis.axis, 0)
            is_used = np.any(rows.reshape(len(rows), -1) != 0, axis=1)[slices.indices]
            is_zero &= ~np.logical_or.reduceat(is_used, np.cumsum(slices.counts) - slices.counts)
        labels.update(group.labels[is_zero].tolist())
    return labels


def _fold_all(
    adapter: GraphAdapter, trace: LabelTrace, groups: Iterable[ChannelGroup], zero_produced: set[int]
) -> tuple[dict[str, Array], list[tuple[str, set[int]]]]:
    """Fold constant channels into the operations that read them; the kernel and labels of failed folds are returned."""
    consumed: dict[tuple[str, int], tuple[list[int], set[int]]] = {}
    for group in groups:
        channels = np.isin(group.labels, list(zero_produced))
        for axis, slices in zip(group.axes, group.slices, strict=True) if channels.any() else ():
            if axis.role is AxisRole.IN:
                indices, labels = consumed.setdefault((axis.tensor, axis.axis), ([], set()))
                indices += slices.of(channels).tolist()
                labels.update(group.labels[channels].tolist())
    weights: dict[str, Array] = {}
    blocked: list[tuple[str, set[int]]] = []
    axes_by_node = _consumed_axes(trace)
    for node in adapter.graph.nodes:
        weights_read = {trace.graph.views[name].tensor for name in node.inputs if name in trace.graph.views}
        for weight_axis in (key for key in axes_by_node.get(node.name, {}) if key[0] in weights_read):
            indices, labels = consumed.get(weight_axis, ([], set()))
            if indices and not fold_into_bias(
                adapter, trace, node, weight_axis=weight_axis, indices=indices, weights=weights
            ):
                blocked.append((weight_axis[0], labels))
    return weights, blocked


def _consumed_axes(trace: LabelTrace) -> dict[str, dict[tuple[str, int], None]]:
    """For each operation by name, the axes of kernels on which it reads channels, without duplicates."""
    by_node: dict[str, dict[tuple[str, int], None]] = {}
    for record in trace.axis_records:
        if record.role is AxisRole.IN and record.labels.any():
            by_node.setdefault(record.node, {})[record.tensor, record.axis] = None
    return by_node
