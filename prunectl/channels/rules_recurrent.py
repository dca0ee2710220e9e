"""A layer that reads its own outputs: a unit is in every gate, and goes from all of them."""

from __future__ import annotations

import numpy as np

from prunectl.channels.graph import Node
from prunectl.channels.labels import LabelArray, spread
from prunectl.channels.trace import Part, Trace, blame


def recurrent(trace: Trace, node: Node) -> None:
    """Read the channels of the last axis and the units of the step before, and make units."""
    data, kernel, inner, *others = node.inputs
    units, gates = node.attributes["units"], node.attributes["gates"]
    made = trace.labels.fresh(units)
    trace.note(node, kernel, -2, Part.OUT, np.tile(made, gates))
    trace.note(node, kernel, -1, Part.IN, trace.line(node, trace.of(data), -1))
    trace.note(node, inner, -2, Part.OUT, np.tile(made, gates))
    trace.note(node, inner, -1, Part.IN, made)
    for name in filter(None, others):
        _beside(trace, node, name, made)
    for name in node.outputs:
        shape = trace.shape(name)
        trace.values[name] = spread(made, len(shape) - 1, shape)


def _beside(trace: Trace, node: Node, name: str, made: LabelArray) -> None:
    """Note a bias or a first state."""
    if name not in trace.graph.views:
        trace.labels.unite(_last(trace.of(name)), made, f"{blame(node)} begins with what is calculated")
        return
    times = trace.shape(name)[-1] // len(made)
    # A state that is not zero would speak for a unit that is silent.
    trace.note(node, name, -1, Part.BIAS, np.tile(made, times))


def _last(labels: LabelArray) -> LabelArray:
    return np.array(labels.reshape(-1, labels.shape[-1])[0])
