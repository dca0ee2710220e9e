"""What a node of an ONNX graph says of itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

STANDARD = ("", "ai.onnx")
MICROSOFT = "com.microsoft"
"""Operators that onnxruntime brings along."""


def setting(node: Any, name: str, default: Any) -> Any:
    """Return an attribute as a plain value."""
    for attribute in node.attribute:
        if attribute.name == name:
            return _plain(attribute)
    return default


def input_of(node: Any, place: int) -> str:
    """Return the name of an input; empty if it is left out."""
    return str(node.input[place]) if place < len(node.input) else ""


def output_of(node: Any, place: int) -> str:
    """Return the name of an output; empty if it is left out."""
    return str(node.output[place]) if place < len(node.output) else ""


def label(node: Any) -> str:
    """Return what the file handler calls a node: its name, else that of its first output."""
    return str(node.name or output_of(node, 0) or node.op_type)


def graphs(node: Any) -> Iterable[tuple[str, Any]]:
    """Yield the graphs inside a node, with the names that the file handler gives them."""
    for attribute in node.attribute:
        found = [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]
        for number, graph in enumerate(found):
            yield (attribute.name if len(found) == 1 else f"{attribute.name}_{number}"), graph


def _plain(attribute: Any) -> Any:
    match attribute.type:
        case 1:
            return float(attribute.f)
        case 3:
            return attribute.s.decode()
        case 7:
            return tuple(attribute.ints)
        case 8:
            return tuple(text.decode() for text in attribute.strings)
        case _:
            return int(attribute.i)
