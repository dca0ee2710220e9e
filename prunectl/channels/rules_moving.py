"""Operations that only move numbers: the same is done to their labels."""

from __future__ import annotations

import numpy as np

from prunectl.channels.graph import Node
from prunectl.channels.labels import LabelArray, fixed
from prunectl.channels.trace import Trace, blame


def concat(trace: Trace, node: Node) -> None:
    """Put labels one behind the other; along another axis than theirs, they are one and the same."""
    shape = trace.shape(node.outputs[0])
    axis = node.attributes["axis"] % len(shape)
    arrays = [trace.of(name) for name in node.inputs]
    across = [array for array in arrays if set(trace.labels.varying(array)) - {axis}]
    if not across:
        # Along the other axes, one position says all.
        first = tuple(slice(None) if number == axis else slice(0, 1) for number in range(len(shape)))
        _put(trace, node, np.broadcast_to(np.concatenate([array[first] for array in arrays], axis), shape))
        return
    if any(trace.labels.varies(array, axis) for array in arrays):
        for array in arrays:
            trace.labels.lock(array, blame(node))
        _put(trace, node, fixed(shape))
        return
    heads = [first_along(array, axis) for array in arrays]
    for head in heads[1:]:
        trace.labels.unite(heads[0], head, f"{blame(node)} joins it with what stays")
    _put(trace, node, np.broadcast_to(next((head for head in heads if head.any()), heads[0]), shape))


def split(trace: Trace, node: Node) -> None:
    """Take labels apart."""
    labels, axis = trace.of(node.inputs[0]), node.attributes["axis"]
    bounds = np.cumsum(node.attributes["sizes"])[:-1]
    for name, part in zip(node.outputs, np.split(labels, bounds, axis), strict=True):
        trace.values[name] = part


def cut_off(trace: Trace, node: Node) -> None:
    """Take a part of some axes."""
    labels = trace.of(node.inputs[0])
    for axis, start, stop, step in node.attributes["slices"]:
        if step != 1 and trace.labels.varies(labels, axis):
            trace.labels.lock(labels, f"{blame(node)} takes channels in another order")
            _put(trace, node, fixed(trace.shape(node.outputs[0])))
            return
        part = slice(start, None if stop < 0 else stop, step)
        labels = labels[(slice(None),) * axis + (part,)]
    _put(trace, node, labels)


def transpose(trace: Trace, node: Node) -> None:
    """Put the axes of labels in another order."""
    _put(trace, node, trace.of(node.inputs[0]).transpose(node.attributes["order"]))


def stretch(trace: Trace, node: Node) -> None:
    """Change the lengths of axes, or take one off, as pooling, padding, slices and upsampling do."""
    labels, shape = trace.of(node.inputs[0]), trace.shape(node.outputs[0])
    axes = node.attributes["axes"]
    if any(trace.labels.varies(labels, axis) for axis in axes):
        trace.labels.lock(labels, f"{blame(node)} reaches over channels")
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
    """Return labels with one position of an axis that they do not differ along."""
    return labels[tuple(slice(0, 1) if number == axis % labels.ndim else slice(None) for number in range(labels.ndim))]


def _put(trace: Trace, node: Node, labels: LabelArray) -> None:
    trace.values[node.outputs[0]] = labels
