"""What each kind of operation does to labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prunectl.channels.graph import Graph, Kind, Node
from prunectl.channels.labels import fixed
from prunectl.channels.rules_each import each
from prunectl.channels.rules_heads import heads
from prunectl.channels.rules_moving import concat, cut_off, split, stretch, transpose
from prunectl.channels.rules_product import product
from prunectl.channels.rules_recurrent import recurrent
from prunectl.channels.rules_reshape import reshape
from prunectl.channels.rules_weights import convolution, embedding, linear, norm
from prunectl.channels.trace import Trace, blame

Rule = Callable[[Trace, Node], None]


def unknown(trace: Trace, node: Node) -> None:
    """Lock whatever meets an operation of which nothing is known."""
    for name in node.inputs:
        trace.labels.lock(trace.of(name), blame(node))
    for name in node.outputs:
        trace.values[name] = fixed(trace.graph.shapes.get(name, ()))


RULES: Mapping[Kind, Rule] = {
    Kind.CONVOLUTION: convolution,
    Kind.LINEAR: linear,
    Kind.EMBEDDING: embedding,
    Kind.PRODUCT: product,
    Kind.RECURRENT: recurrent,
    Kind.HEADS: heads,
    Kind.NORM: norm,
    Kind.EACH: each,
    Kind.CONCAT: concat,
    Kind.SPLIT: split,
    Kind.SLICE: cut_off,
    Kind.TRANSPOSE: transpose,
    Kind.RESHAPE: reshape,
    Kind.STRETCH: stretch,
    Kind.UNKNOWN: unknown,
}


def follow(graph: Graph) -> Trace:
    """Return what a network does to channels, from its inputs to its outputs."""
    trace = Trace(graph)
    for node in graph.nodes:
        RULES[node.kind](trace, node)
    for name in graph.outputs:
        trace.labels.lock(trace.of(name), f"{name} is an output of the network")
    trace.settle()
    return trace
