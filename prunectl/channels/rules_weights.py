"""Operations that make channels from channels, by weights; and those that scale them one by one."""

from __future__ import annotations

import numpy as np

from prunectl.channels.graph import Node
from prunectl.channels.labels import LabelArray, fixed, spread
from prunectl.channels.trace import Part, Trace, blame


def convolution(trace: Trace, node: Node) -> None:
    """Read the channels of axis 1, and make new ones; one by one if each is a group by itself."""
    labels, shape = trace.of(node.inputs[0]), trace.shape(node.outputs[0])
    if not trace.is_view(node, 1):
        _lock(trace, node)
        return
    groups, is_transposed = node.attributes["groups"], node.attributes["is_transposed"]
    kernel, inputs = node.inputs[1], trace.line(node, labels, 1)
    in_axis, out_axis = (0, 1) if is_transposed else (1, 0)
    if groups > 1 and groups == len(inputs):
        made = np.repeat(inputs, shape[1] // groups)
        # Axis 0 runs over the groups, and with them over what goes in and what comes out.
        trace.note(node, kernel, 0, Part.OUT, inputs if is_transposed else made)
    else:
        per_group = inputs.reshape(groups, -1)
        for others in per_group[1:]:
            trace.labels.unite(per_group[0], others, blame(node))
        fresh = trace.labels.fresh(shape[1] // groups)
        made = np.tile(fresh, groups)
        trace.note(node, kernel, out_axis, Part.OUT, fresh if is_transposed else made)
        trace.note(node, kernel, in_axis, Part.IN, inputs if is_transposed else per_group[0])
    _bias(trace, node, made)
    trace.values[node.outputs[0]] = spread(made, 1, shape)


def linear(trace: Trace, node: Node) -> None:
    """Read the channels of the last axis, and make new ones."""
    labels, shape = trace.of(node.inputs[0]), trace.shape(node.outputs[0])
    if not trace.is_view(node, 1):
        _lock(trace, node)
        return
    in_axis = node.attributes["in_axis"]
    inputs = trace.line(node, labels, -1)
    made = trace.labels.fresh(shape[-1])
    trace.note(node, node.inputs[1], 1 - in_axis, Part.OUT, made)
    trace.note(node, node.inputs[1], in_axis, Part.IN, inputs)
    _bias(trace, node, made)
    trace.values[node.outputs[0]] = spread(made, len(shape) - 1, shape)


def embedding(trace: Trace, node: Node) -> None:
    """Make channels on the last axis; the rows are words, of which none goes."""
    shape = trace.shape(node.outputs[0])
    trace.labels.lock(trace.of(node.inputs[1]), blame(node))
    made = trace.labels.fresh(shape[-1])
    table = node.inputs[0]
    trace.note(node, table, 1, Part.OUT, made)
    trace.note(node, table, 0, Part.OTHER, np.array(fixed((trace.shape(table)[0],))))
    trace.values[node.outputs[0]] = spread(made, len(shape) - 1, shape)


def norm(trace: Trace, node: Node) -> None:
    """Scale and shift each channel by itself."""
    labels = trace.of(node.inputs[0])
    line = trace.line(node, labels, 1)
    for place, part in enumerate((Part.SCALE, Part.SHIFT, Part.STATE, Part.STATE), 1):
        if trace.is_view(node, place):
            trace.note(node, node.inputs[place], 0, part, line)
        elif place < len(node.inputs) and node.inputs[place]:
            trace.labels.lock(labels, f"{blame(node)} has weights that are calculated")
    trace.values[node.outputs[0]] = labels


def _bias(trace: Trace, node: Node, made: LabelArray) -> None:
    if len(node.inputs) < 3 or not node.inputs[2]:
        return
    name = node.inputs[2]
    if not trace.is_view(node, 2):
        trace.labels.lock(made, f"{blame(node)} has a bias that is calculated")
        return
    shape = trace.shape(name)
    if shape and shape[-1] == len(made) and len(shape) == sum(length == 1 for length in shape[:-1]) + 1:
        trace.note(node, name, len(shape) - 1, Part.BIAS, made)
    elif any(length > 1 for length in shape):
        trace.labels.lock(made, f"{blame(node)} has a bias for more than channels")


def _lock(trace: Trace, node: Node) -> None:
    """Lock what meets weights that are calculated."""
    for name in node.inputs:
        trace.labels.lock(trace.of(name), f"{blame(node)} has weights that are calculated")
    trace.values[node.outputs[0]] = fixed(trace.shape(node.outputs[0]))
