"""Operations element by element: what meets there is one channel."""

from __future__ import annotations

import numpy as np

from prunectl.channels.graph import Node
from prunectl.channels.labels import LabelArray, fixed
from prunectl.channels.trace import Part, Trace, blame


def each(trace: Trace, node: Node) -> None:
    """Unite the labels of what is added, multiplied or compared, and note the weights among it."""
    shape = trace.shape(node.outputs[0])
    names = [name for name in node.inputs if name]
    values = [_aligned(trace.of(name), len(shape)) for name in names if name not in trace.graph.views]
    joined = _joined(trace, node, values, shape)
    for name in names:
        if name in trace.graph.views:
            _weight(trace, node, name, joined)
    for name in node.outputs:
        trace.values[name] = joined


def _joined(trace: Trace, node: Node, values: list[LabelArray], shape: tuple[int, ...]) -> LabelArray:
    """Return the labels of the outcome."""
    kept = values
    for axis in (axis for axis, length in enumerate(shape) if length > 1):
        if any(trace.labels.varies(value, axis) for value in kept):
            # One channel for all of an axis of channels: it has to stay.
            for value in kept:
                if value.shape[axis] == 1:
                    trace.labels.lock(value, f"{blame(node)} takes it for many channels")
            kept = [value for value in kept if value.shape[axis] > 1]
    whole = [np.broadcast_to(value, shape) for value in kept]
    for other in whole[1:]:
        trace.labels.unite(whole[0], other, f"{blame(node)} joins it with what stays")
    labelled = [value for value in whole if value.any()]
    return next(iter(labelled), fixed(shape))


def _weight(trace: Trace, node: Node, name: str, joined: LabelArray) -> None:
    """Note a weight that has a number for each channel, whichever its axis."""
    shape = trace.shape(name)
    behind = joined.ndim - len(shape)
    axes = [axis for axis, length in enumerate(shape) if length > 1 and trace.labels.varies(joined, axis + behind)]
    if not axes:
        return
    line = trace.labels.along(joined, axes[0] + behind)
    if line is None:
        trace.labels.lock(joined, f"{blame(node)} mixes channels with positions")
    else:
        trace.note(node, name, axes[0], Part.OTHER, line)


def _aligned(labels: LabelArray, rank: int) -> LabelArray:
    return labels.reshape((1,) * (rank - labels.ndim) + labels.shape)
