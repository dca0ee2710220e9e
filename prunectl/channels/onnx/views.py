"""The weights of an ONNX graph, and the names under which operations see them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from prunectl.channels.graph import View
from prunectl.channels.onnx.shapes import STANDARD
from prunectl.formats.base import Array
from prunectl.formats.optional import require

_FLOATS = frozenset({1, 10, 11})
"""Types of element that channels are cut from: float32, float16, float64."""


def tensors(graph: Any) -> Iterator[tuple[str, Any]]:
    """Yield the messages of all tensors with a name: initializers, and those of Constant nodes."""
    for tensor in graph.initializer:
        yield tensor.name, tensor
    for node in graph.node:
        if node.op_type == "Constant" and node.domain in STANDARD:
            for attribute in node.attribute:
                if attribute.name == "value":
                    yield node.output[0], attribute.t


def weights(graph: Any) -> dict[str, Array]:
    """Return the numbers of all weights that may be cut."""
    to_array = require("onnx.numpy_helper", extra="onnx").to_array
    return {
        name: np.asarray(to_array(tensor))
        for name, tensor in tensors(graph)
        if tensor.data_type in _FLOATS and len(tensor.dims) >= 1
    }


def views(graph: Any, held: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, View]:
    """Return weights as operations see them, followed through those that only hand them on."""
    found = {name: View(name, tuple(range(array.ndim))) for name, array in held.items()}
    for node in graph.node:
        if node.domain in STANDARD and node.input and node.input[0] in found and node.output[0] in shapes:
            axes = _axes(node, found[node.input[0]].axes, shapes[node.input[0]], shapes[node.output[0]])
            if axes is not None:
                found[node.output[0]] = View(found[node.input[0]].tensor, axes)
    return found


def uses(graph: Any, seen: Mapping[str, View]) -> Counter[str]:
    """Return how often each weight meets an operation that does not only hand it on, or leaves the network."""
    found: Counter[str] = Counter()
    for node in graph.node:
        if not (node.output and node.output[0] in seen):
            found.update(seen[name].tensor for name in read_by(node) if name in seen)
    found.update(seen[port.name].tensor for port in graph.output if port.name in seen)
    return found


def read_by(node: Any) -> list[str]:
    """Return the values that a node reads, those that its branches read from outside included."""
    found = list(node.input)
    for attribute in node.attribute:
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            own = {port.name for port in (*graph.input, *graph.initializer)}
            own |= {name for inner in graph.node for name in inner.output}
            found += [name for inner in graph.node for name in read_by(inner) if name not in own]
            found += [port.name for port in graph.output if port.name not in own]
    return found


def _axes(
    node: Any, axes: tuple[int | None, ...], before: tuple[int, ...], after: tuple[int, ...]
) -> tuple[int | None, ...] | None:
    match node.op_type:
        case "Identity":
            return axes
        case "Cast" if all(attribute.i in _FLOATS for attribute in node.attribute if attribute.name == "to"):
            return axes
        case "Transpose":
            turned = [tuple(attribute.ints) for attribute in node.attribute if attribute.name == "perm"]
            order = turned[0] if turned else tuple(reversed(range(len(axes))))
            return tuple(axes[axis] for axis in order)
        case "Unsqueeze" | "Squeeze":
            # Only axes of length 1 come and go: the others keep their order.
            longer = iter([axis for axis, length in zip(axes, before, strict=True) if length != 1])
            return tuple(None if length == 1 else next(longer) for length in after)
        case _:
            return None
