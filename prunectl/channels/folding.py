"""What a layer reads from channels that never change is a constant: it can be a part of its bias."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prunectl.channels.graph import Kind, Node
from prunectl.channels.source import Source
from prunectl.channels.trace import Trace
from prunectl.formats.base import Array

_INPUTS = 2
"""What is always the same is so for different ones."""
_CLOSE = 1e-5
"""How far numbers may be apart that are one, relative to the largest that comes out."""


def fold(
    source: Source,
    trace: Trace,
    node: Node,
    *,
    place: tuple[str, int],
    indices: Sequence[int],
    weights: dict[str, Array],
) -> bool:
    """Let a layer read nothing at some indices, and keep what it read there in its bias; False where it cannot.

    The weights are those that were changed before, and get what changes here.
    """
    if node.outputs[0] not in source.showable:
        return False
    name, axis = place
    kernel = np.array(weights.get(name, source.graph.weights[name]))
    np.moveaxis(kernel, axis, 0)[list(indices)] = 0
    difference, scale = _difference(source, node, weights, {**weights, name: kernel})
    constant = _constant(node, difference, scale)
    if constant is None or (constant.any() and not _keep(trace, node, constant, weights)):
        return False
    weights[name] = kernel
    return True


def _difference(source: Source, node: Node, before: dict[str, Array], after: dict[str, Array]) -> tuple[Array, float]:
    """Return what it makes of a difference, for several inputs behind one another, and the largest number there."""
    runners = [source.runner(source.with_weights(weights), node.outputs[:1]) for weights in (before, after)]
    random = np.random.default_rng(0)
    given = [source.feeds(random) for _ in range(_INPUTS)]
    one, other = (np.stack([np.asarray(run(feeds)[-1], np.float64) for feeds in given]) for run in runners)
    return one - other, float(np.abs(one).max(initial=0.0)) or 1.0


def _constant(node: Node, difference: Array, scale: float) -> Array | None:
    """Return one number for each channel that comes out; None if it depends on what goes in, or on the position."""
    # In front of the axes of the operation is that of the inputs.
    axis = 2 if node.kind is Kind.CONVOLUTION else difference.ndim - 1
    rows = np.moveaxis(difference, axis, 0).reshape(difference.shape[axis], -1)
    if node.kind is Kind.RECURRENT:
        # What comes out is no sum: it cannot make up for anything.
        return np.zeros(len(rows)) if np.abs(rows).max(initial=0.0) <= _CLOSE * scale else None
    if np.ptp(rows, axis=1).max(initial=0.0) > _CLOSE * scale:
        return None
    found: Array = rows.mean(axis=1)
    return found if np.abs(found).max(initial=0.0) > _CLOSE * scale else np.zeros_like(found)


def _keep(trace: Trace, node: Node, constant: Array, weights: dict[str, Array]) -> bool:
    """Add a constant to a bias, or to what is added next, or take it from the mean that is subtracted next."""
    if trace.is_view(node, 2):
        return _add(trace, node.inputs[2], constant, weights)
    reader, axis, is_turned = _behind(trace, node)
    if reader is None:
        return False
    if reader.kind is Kind.NORM and trace.is_view(reader, 3) and axis == 1:
        return _add(trace, reader.inputs[3], -constant, weights)
    if not is_turned and reader.kind is Kind.EACH and reader.op.lower() == "add":
        held = [name for name in reader.inputs if name in trace.graph.views]
        return len(held) == 1 and _add(trace, held[0], constant, weights)
    return False


def _behind(trace: Trace, node: Node) -> tuple[Node | None, int, bool]:
    """Return the only operation that reads an output, the axis of its channels there, and if its axes were turned."""
    axis = 1 if node.kind is Kind.CONVOLUTION else len(trace.shape(node.outputs[0])) - 1
    is_turned = False
    while len(readers := trace.readers(node)) == 1:
        (node,) = readers
        if node.kind is not Kind.TRANSPOSE:
            return node, axis, is_turned
        axis, is_turned = list(node.attributes["order"]).index(axis), True
    return None, axis, is_turned


def _add(trace: Trace, name: str, constant: Array, weights: dict[str, Array]) -> bool:
    tensor = trace.graph.views[name].tensor
    array = weights.get(tensor, trace.graph.weights[tensor])
    if array.size != constant.size or trace.graph.uses[tensor] != 1:
        return False
    weights[tensor] = (array.astype(np.float64) + constant.reshape(array.shape)).astype(array.dtype)
    return True
