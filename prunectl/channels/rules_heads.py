"""An attention whose projections have an axis of heads: a head goes from all four of them."""

from __future__ import annotations

from prunectl.channels.graph import Node
from prunectl.channels.labels import spread
from prunectl.channels.trace import Part, Trace, blame

_DATA, _KERNELS, _BIASES = slice(0, 3), slice(3, 6), slice(7, 10)
_OUT, _OUT_BIAS = 6, 10


def heads(trace: Trace, node: Node) -> None:
    """Read the channels of the last axes, put heads in between, and make new channels."""
    kernel, bias, *masks = node.inputs[_OUT], node.inputs[_OUT_BIAS], *node.inputs[_OUT_BIAS + 1 :]
    between = trace.labels.fresh(trace.shape(kernel)[0])
    for data, own in zip(node.inputs[_DATA], node.inputs[_KERNELS], strict=True):
        trace.note(node, own, 0, Part.IN, trace.line(node, trace.of(data), -1))
        trace.note(node, own, 1, Part.OUT, between)
    for own in filter(None, node.inputs[_BIASES]):
        trace.note(node, own, 0, Part.BIAS, between)
    for mask in masks:
        trace.labels.lock(trace.of(mask), f"{blame(node)} has a mask that is calculated")
    shape = trace.shape(node.outputs[0])
    made = trace.labels.fresh(shape[-1])
    trace.note(node, kernel, 0, Part.IN, between)
    trace.note(node, kernel, 2, Part.OUT, made)
    if bias:
        trace.note(node, bias, 0, Part.BIAS, made)
    trace.values[node.outputs[0]] = spread(made, len(shape) - 1, shape)
