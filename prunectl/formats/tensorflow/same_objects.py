"""Which variable of one checkpoint is which of another, as the same names lead to them."""

from __future__ import annotations

from prunectl.formats.tensorflow.object_graph import Node, ObjectGraph

_LISTS = frozenset(
    {
        "keras_api",
        "layers",
        "metrics",
        "non_trainable_variables",
        "optimizer",
        "regularization_losses",
        "signatures",
        "trainable_variables",
        "variables",
    }
)
"""What numbers its variables anew once some are gone."""
PRUNED, _INNER = "pruning_vars", "layer"


def pairs(wrapped: ObjectGraph, plain: ObjectGraph) -> dict[str, str]:
    """Return the key in the wrapped model of each variable of the plain one that the same names lead to."""
    found: dict[str, str] = {}
    pending = [(0, 0)] if wrapped.nodes and plain.nodes else []
    seen = set(pending)
    for one, other in pending:
        ours, theirs = _inside(wrapped, one), plain.nodes[other]
        found.update(zip(theirs.names, ours.names, strict=False))
        near = dict(ours.children)
        for name, child in theirs.children:
            if name in _LISTS or name not in near:
                continue
            pair = near[name], child
            if pair not in seen and pair[0] < len(wrapped.nodes) and child < len(plain.nodes):
                seen.add(pair)
                pending.append(pair)
    return found


def masks(graph: ObjectGraph) -> dict[str, str]:
    """Return the key of the mask of each pruned weight, by the key of the weight."""
    found: dict[str, str] = {}
    for node in graph.nodes:
        for several in _children(graph, node, PRUNED):
            for _, child in several.children:
                members = dict(graph.nodes[child].children)
                weight, mask = (graph.nodes[members[at]].names for at in ("0", "1"))
                found.update(zip(weight, mask, strict=True))
    return found


def _inside(graph: ObjectGraph, number: int) -> Node:
    """Return an object, or for a pruning wrapper the layer in it."""
    node = graph.nodes[number]
    inner = _children(graph, node, _INNER)
    return inner[0] if inner and _children(graph, node, PRUNED) else node


def _children(graph: ObjectGraph, node: Node, wanted: str) -> list[Node]:
    return [graph.nodes[child] for name, child in node.children if name == wanted and child < len(graph.nodes)]
