"""Numbers in the same order under another shape: where an axis of channels falls apart, blocks go together."""

from __future__ import annotations

import numpy as np

from prunectl.channels.graph import Kind, Node
from prunectl.channels.labels import fixed
from prunectl.channels.trace import Trace, blame

_FUSED = frozenset({2, 3})
"""Queries, keys and values in one matrix; or keys and values."""


def reshape(trace: Trace, node: Node) -> None:
    """Give labels another shape; a channel that goes must leave a block behind on both sides."""
    labels, shape = trace.of(node.inputs[0]), trace.shape(node.outputs[0])
    found = np.reshape(labels, shape)
    axes = trace.labels.varying(found)
    if len(axes) > 1 and len(trace.labels.varying(labels)) == 1:
        stays = _staying(trace, node, axes, shape)
        for axis in axes:
            if axis != stays:
                trace.labels.unite(found, found.take([0], axis=axis), blame(node))
    left = trace.labels.varying(found)
    if max(len(trace.labels.varying(labels)), len(left)) > 1 or (axes and not left):
        trace.labels.lock(labels, f"{blame(node)} takes channels apart")
        found = np.array(fixed(shape))
    trace.values[node.outputs[0]] = found


def _staying(trace: Trace, node: Node, axes: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """Return the axis along which channels still differ.

    In a shuffle of channels it is the last, as the same number of each group must stay. Otherwise whole blocks go,
    such as the heads of an attention.
    """
    if _is_shuffle(trace, node):
        return axes[-1]
    heads = [axis for axis in axes[:-1] if len(axes) == 2 or shape[axis] not in _FUSED]
    return heads[0] if heads else axes[0]


def _is_shuffle(trace: Trace, node: Node) -> bool:
    """Whether all that follows is another order of the axes, and the old shape again."""
    readers = trace.readers(node)
    if not readers or any(reader.kind is not Kind.TRANSPOSE for reader in readers):
        return False
    behind = [after for reader in readers for after in trace.readers(reader)]
    before = trace.shape(node.inputs[0])
    return bool(behind) and all(
        after.kind is Kind.RESHAPE and trace.graph.shapes.get(after.outputs[0]) == before for after in behind
    )
