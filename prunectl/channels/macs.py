"""How often does a network multiply and add, before a cut and after?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from prunectl.channels.graph import Graph, Kind, Node
from prunectl.channels.source import Removed

ShapeOf = Callable[[str], tuple[int, ...]]


def macs(graph: Graph, shape_of: ShapeOf, removed: Removed | None = None) -> int:
    """Return the multiply-adds of one example in all operations that weights or products make up."""
    sizes = {
        name: math.prod(
            length - len((removed or {}).get((view.tensor, axis), ())) if axis is not None else 1
            for axis, length in zip(view.axes, graph.shapes[name], strict=True)
        )
        for name, view in graph.views.items()
    }
    return sum(_of(node, shape_of, sizes) for node in graph.nodes)


def _of(node: Node, shape_of: ShapeOf, sizes: Mapping[str, int]) -> int:
    if node.kind is Kind.PRODUCT:
        return math.prod(shape_of(node.outputs[0])) * shape_of(node.inputs[0])[-1]
    if node.kind is Kind.HEADS:
        return _of_heads(node, shape_of, sizes)
    if len(node.inputs) < 2 or node.inputs[1] not in sizes:
        return 0
    match node.kind:
        case Kind.CONVOLUTION:
            spread = node.inputs[0] if node.attributes["is_transposed"] else node.outputs[0]
            return sizes[node.inputs[1]] * math.prod(shape_of(spread)[2:])
        case Kind.LINEAR:
            return sizes[node.inputs[1]] * math.prod(shape_of(node.inputs[0])[:-1])
        case Kind.RECURRENT:
            steps = math.prod(shape_of(node.inputs[0])[:-1])
            return (sizes[node.inputs[1]] + sizes[node.inputs[2]]) * steps
        case _:
            return 0


def _of_heads(node: Node, shape_of: ShapeOf, sizes: Mapping[str, int]) -> int:
    """Return what the projections cost, and the two products of all positions with all positions."""
    steps = [math.prod(shape_of(data)[:-1]) for data in node.inputs[:3]]
    made = [sizes[kernel] // shape_of(data)[-1] for data, kernel in zip(node.inputs[:3], node.inputs[3:6], strict=True)]
    times = zip(node.inputs[3:7], (*steps, steps[0]), strict=True)
    # Numbers for each position in all heads: as many in a query as in a key.
    return sum(sizes[kernel] * count for kernel, count in times) + steps[0] * steps[1] * (made[0] + made[1])
