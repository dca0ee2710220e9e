"""What an exported program does with its weights: which operation takes which, through what hands them on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prunectl.formats.base import Tensor
from prunectl.formats.state_dict import Use
from prunectl.formats.torch.pt2_nodes import Graph, Node, inner_graph, input_names, main_graph
from prunectl.formats.torch.uses import (
    CALCULATED,
    FIRST,
    NOTHING,
    RECURRENT,
    TAKEN,
    Flow,
    Origin,
    Origins,
    joined,
    passed,
)

MAX_DEPTH = 20
_OPERANDS = ("self", "other")


def uses(program: Mapping[str, Any], tensors: list[Tensor]) -> dict[str, Use | None]:
    """Return what each weight is used for; of a program whose graph is not at hand, nothing."""
    if not program:
        return {}
    flow = Flow()
    graph = main_graph(program)
    _follow(graph, {name: frozenset((Origin(weight),)) for name, weight in graph.weights.items()}, flow, 0)
    found = flow.found()
    return {tensor.name: found.get(tensor.name) for tensor in tensors}


def _follow(graph: Graph, values: dict[str, Origins], flow: Flow, depth: int) -> None:
    for node in graph.nodes:
        arguments = {name: joined(values.get(one, NOTHING) for one in _tensors(node, name)) for name in node.arguments}
        if node.op in RECURRENT:
            flow.recur(node.op, [values.get(one, NOTHING) for one in node.tensors("params")])
        elif node.op in TAKEN:
            flow.use(node.op, arguments, is_transposed=node.flag("transposed"))
        else:
            first = _OPERANDS if node.op in CALCULATED else FIRST
            made = passed(node.op, joined(arguments.get(name, NOTHING) for name in first))
            values.update(dict.fromkeys(node.outputs, made) if made else {})
        for inner in node.graphs if depth < MAX_DEPTH else ():
            operands = [values.get(name, NOTHING) for name in node.operands]
            below = inner_graph(inner, node.operands, graph)
            _follow(below, dict(zip(input_names(inner), operands, strict=False)), flow, depth + 1)


def _tensors(node: Node, argument: str) -> tuple[str, ...]:
    return tuple(filter(None, (node.tensor(argument), *node.tensors(argument))))
