"""The nodes of an ONNX graph in an order that follows from what they make alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any


def order(graph: Any) -> None:
    """Put nodes after what they need, those for the first output first, and leave out what nothing needs."""
    for node in graph.node:
        for inner in inner_graphs(node):
            order(inner)
    nodes = [_copy(node) for node in graph.node]
    makers = {name: at for at, node in enumerate(nodes) for name in node.output if name}
    ordered = _ordered(nodes, makers, [port.name for port in graph.output])
    del graph.node[:]
    graph.node.extend(nodes[at] for at in ordered)
    used = dict.fromkeys(name for node in graph.node for name in needs(node))
    used |= dict.fromkeys(port.name for port in graph.output)
    held = {one.name: _copy(one) for one in graph.initializer}
    del graph.initializer[:]
    graph.initializer.extend(held[name] for name in used if name in held)


def inner_graphs(node: Any) -> Iterator[Any]:
    """Yield the graphs inside a node, such as the body of a loop."""
    for attribute in node.attribute:
        for inner in (attribute.g, *attribute.graphs):
            if inner.node or inner.output:
                yield inner


def needs(node: Any) -> Iterator[str]:
    """Yield what a node takes, also what the graphs inside it take from around them."""
    yield from filter(None, node.input)
    for inner in inner_graphs(node):
        own = {one.name for one in (*inner.input, *inner.initializer)}
        own |= {name for one in inner.node for name in one.output}
        yield from (name for one in inner.node for name in needs(one) if name not in own)
        yield from (port.name for port in inner.output if port.name not in own)


def _ordered(nodes: list[Any], makers: dict[str, int], wanted: Iterable[str]) -> list[int]:
    found: dict[int, None] = {}
    entered: set[int] = set()
    pending = [makers[name] for name in reversed(list(wanted)) if name in makers]
    while pending:
        at = pending[-1]
        if at in found:
            pending.pop()
            continue
        missing = [makers[name] for name in needs(nodes[at]) if name in makers and makers[name] not in found]
        if not missing or at in entered:
            found[at] = None
            pending.pop()
            continue
        entered.add(at)
        pending.extend(reversed(missing))
    return list(found)


def _copy(message: Any) -> Any:
    found = type(message)()
    found.CopyFrom(message)
    return found
