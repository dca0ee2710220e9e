"""The nodes of an exported program's graph: what each takes, by name, and what is known of its sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prunectl.formats.lengths import Shape
from prunectl.formats.torch import pt2_sizes
from prunectl.formats.torch.pt2_graph import argument_names, as_dict, as_list, operation
from prunectl.formats.torch.values import shown

MAX_NODES = 1_000_000
_PASSING = frozenset(
    {
        *("t", "transpose", "permute", "view", "reshape", "contiguous", "detach", "alias", "to", "_to_copy", "clone"),
        *("unsqueeze", "squeeze", "expand", "numpy_T", "lift_fresh_copy", "_unsafe_view"),
    }
)
_MAX_PASSED = 8


@dataclass(frozen=True, slots=True)
class Node:
    """One operation, with its arguments by name."""

    op: str
    """Such as `conv2d` for `torch.ops.aten.conv2d.default`."""
    arguments: Mapping[str, Any]
    outputs: tuple[str, ...]
    module: str
    """The path of the module that it belongs to."""

    def tensor(self, argument: str) -> str:
        """Name of the tensor that an argument is."""
        return _text(as_dict(as_dict(self.arguments.get(argument)).get("as_tensor")).get("name"))

    def tensors(self, argument: str) -> tuple[str, ...]:
        """Names of the tensors that an argument lists."""
        listed = as_list(as_dict(self.arguments.get(argument)).get("as_tensors"))
        return tuple(_text(as_dict(one).get("name")) for one in listed)

    def flag(self, argument: str) -> bool:
        """An argument that is off unless it is on."""
        return as_dict(self.arguments.get(argument)).get("as_bool") is True

    def word(self, argument: str) -> str:
        """An argument that is a text."""
        return _text(as_dict(self.arguments.get(argument)).get("as_string"))

    @property
    def graphs(self) -> tuple[Mapping[str, Any], ...]:
        """Graphs that it runs, once or in a loop or not at all."""
        found = (as_dict(as_dict(as_dict(one).get("as_graph")).get("graph")) for one in self.arguments.values())
        return tuple(graph for graph in found if graph)

    @property
    def operands(self) -> tuple[str, ...]:
        """Names of the tensors that its graphs run on: all that follows the last of them."""
        keys = list(self.arguments)
        first = max((place + 1 for place, key in enumerate(keys) if _is_graph(self.arguments[key])), default=len(keys))
        return tuple(name for key in keys[first:] for name in (self.tensor(key), *self.tensors(key)) if name)


@dataclass(frozen=True, slots=True)
class Graph:
    """A graph with the sizes of its tensors and the names of its weights."""

    nodes: tuple[Node, ...]
    sizes: Mapping[str, Any]
    ones: frozenset[str]
    """Symbols of the batch."""
    weights: Mapping[str, str]
    """Names of tensors of the model by the names that the graph gives them."""
    makers: Mapping[str, Node]

    def shape(self, name: str) -> Shape | None:
        """Return what is known of the shape of a tensor."""
        return pt2_sizes.shape(as_dict(self.sizes.get(name)).get("sizes"), self.ones)

    def weight(self, name: str) -> str:
        """Return the tensor of the model that this is, behind what only hands it on."""
        for _ in range(_MAX_PASSED):
            maker = self.makers.get(name)
            if name in self.weights or maker is None or maker.op not in _PASSING:
                break
            name = next(filter(None, map(maker.tensor, ("self", "input"))), "")
        return self.weights.get(name, "")


def main_graph(program: Mapping[str, Any]) -> Graph:
    """Return the graph of a program."""
    module = as_dict(program.get("graph_module"))
    graph, specs = as_dict(module.get("graph")), as_list(as_dict(module.get("signature")).get("input_specs"))
    sizes = as_dict(graph.get("tensor_values"))
    inputs = [
        _text(as_dict(as_dict(as_dict(as_dict(one).get("user_input")).get("arg")).get("as_tensor")).get("name"))
        for one in specs
    ]
    ones = frozenset(filter(None, (pt2_sizes.first_symbol(as_dict(sizes.get(name)).get("sizes")) for name in inputs)))
    return _graph(graph, ones, argument_names(specs))


def inner_graph(graph: Mapping[str, Any], operands: tuple[str, ...], outer: Graph) -> Graph:
    """Return a graph that a node of another one runs on some operands."""
    taken = input_names(graph)
    weights = {inner: outer.weight(name) for inner, name in zip(taken, operands, strict=False) if outer.weight(name)}
    return _graph(graph, outer.ones, weights)


def input_names(graph: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what a graph that a node runs calls its inputs."""
    return tuple(_text(as_dict(as_dict(one).get("as_tensor")).get("name")) for one in as_list(graph.get("inputs")))


def _graph(graph: Mapping[str, Any], ones: frozenset[str], weights: Mapping[str, str]) -> Graph:
    nodes = tuple(_node(as_dict(one)) for one in as_list(graph.get("nodes"))[:MAX_NODES])
    makers = {name: node for node in nodes for name in node.outputs}
    return Graph(nodes, as_dict(graph.get("tensor_values")), ones, weights, makers)


def _node(found: Mapping[str, Any]) -> Node:
    named = [(_text(as_dict(one).get("name")), as_dict(one).get("arg")) for one in as_list(found.get("inputs"))]
    # What higher operations run and pass on has no names.
    arguments = {name or str(place): value for place, (name, value) in enumerate(named)}
    outputs = tuple(_text(as_dict(one).get("name")) for made in as_list(found.get("outputs")) for one in _made(made))
    stack = _text(as_dict(found.get("metadata")).get("nn_module_stack"))
    module = stack.rpartition(";")[2].split(",")
    return Node(operation(_text(found.get("target"))), arguments, outputs, shown(module[1]) if len(module) > 1 else "")


def _made(output: Any) -> list[Any]:
    """Return the tensor that an output is, or those that it lists."""
    listed = as_list(as_dict(output).get("as_tensors"))
    return listed or [as_dict(output).get("as_tensor")]


def _is_graph(argument: Any) -> bool:
    return "as_graph" in as_dict(argument)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
