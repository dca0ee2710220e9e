"""Walks over an ONNX graph: attributes, graphs inside nodes, and the values that each node reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

STANDARD_DOMAINS = frozenset({"", "ai.onnx"})
FLOAT_TYPES = frozenset({1, 10, 11, 16})
"""Types of element: float32, float16, float64, bfloat16."""
Axis = TypeVar("Axis", bound=int | None)


def find_attribute(node: Any, name: str) -> Any:
    """The message of an attribute; None if the node has none of that name."""
    return next((attribute for attribute in node.attribute if attribute.name == name), None)


def get_attribute(node: Any, name: str, default: Any) -> Any:
    """An attribute as a plain value, lists as tuples."""
    attribute = find_attribute(node, name)
    if attribute is None:
        return default
    match attribute.type:
        case 1:
            return float(attribute.f)
        case 2:
            return int(attribute.i)
        case 3:
            return attribute.s.decode(errors="replace")
        case 8:
            return tuple(text.decode(errors="replace") for text in attribute.strings)
        case _:
            return tuple(attribute.ints)


def input_of(node: Any, index: int) -> str:
    """The name of an input; empty if it is left out."""
    return str(node.input[index]) if index < len(node.input) else ""


def output_of(node: Any, index: int) -> str:
    """The name of an output; empty if it is left out."""
    return str(node.output[index]) if index < len(node.output) else ""


def axes_behind(node: Any, axes: tuple[Axis, ...]) -> tuple[Axis, ...] | None:
    """The axes of a tensor behind a node that hands it on; None if it does something else to it."""
    if node.domain not in STANDARD_DOMAINS:
        return None
    match node.op_type:
        case "Identity":
            return axes
        case "Cast" if get_attribute(node, "to", 0) in FLOAT_TYPES:
            return axes
        case "Transpose":
            return tuple(axes[axis] for axis in get_attribute(node, "perm", tuple(reversed(range(len(axes))))))
        case _:
            return None


def inner_graphs(node: Any) -> Iterator[tuple[str, Any]]:
    """Yield the graphs inside a node, such as the body of a loop, with the names that the file handler gives them."""
    for attribute in node.attribute:
        graphs = [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]
        for number, graph in enumerate(graphs):
            yield (attribute.name if len(graphs) == 1 else f"{attribute.name}_{number}"), graph


def all_graphs(graph: Any) -> Iterator[Any]:
    """Yield a graph and those inside its nodes, at any depth."""
    yield graph
    for node in graph.node:
        for _, inner in inner_graphs(node):
            yield from all_graphs(inner)


def names_defined(graph: Any) -> set[str]:
    """The names that a graph gives itself, which inside of it hide those of the graphs around it."""
    own = {value.name for value in (*graph.input, *graph.initializer)}
    return own | {name for node in graph.node for name in node.output}


def names_read(node: Any) -> Iterator[str]:
    """Yield the values that a node reads, including those that its inner graphs capture."""
    yield from filter(None, node.input)
    yield from names_captured(node)


def names_captured(node: Any) -> Iterator[str]:
    """Yield the values that the inner graphs of a node read from outside."""
    for _, inner in inner_graphs(node):
        own = names_defined(inner)
        yield from (name for inner_node in inner.node for name in names_read(inner_node) if name not in own)
        yield from (port.name for port in inner.output if port.name not in own)


def opset_of(proto: Any) -> int | None:
    """The version of the default operator set that a model imports."""
    return next((opset.version for opset in proto.opset_import if opset.domain in STANDARD_DOMAINS), None)


def copy_message(message: Any) -> Any:
    """A message of protobuf, copied out of the one that holds it."""
    copy = type(message)()
    copy.CopyFrom(message)
    return copy
