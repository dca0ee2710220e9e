"""Where the numbers of each tensor stand in an ONNX message, under the name that the file handler gives it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from prunectl.formats.onnx.dtypes import STRING
from prunectl.formats.onnx.names import Names
from prunectl.training.onnx import nodes

_FLOAT = 1


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor of numbers, in a graph or in a Constant node of it."""

    name: str
    """Its name in the model."""
    inner: str
    """Its name in that graph."""
    data_type: int
    scope: Any
    """The graph or the function around it."""
    is_main: bool
    node: Any = None
    """The Constant node that makes it."""
    dense: Any = None
    """The message of its numbers."""
    sparse: Any = None
    """The message of its numbers without the zeros."""


def places(model: Any) -> Iterator[Place]:
    """Yield all tensors in the order in which the file handler names them."""
    names = Names()
    waiting: list[tuple[str, Any]] = [("", model.graph)]
    waiting += [(f"{function.name}/", function) for function in model.functions]
    training = [graph for part in model.training_info for graph in _of_training(part)]
    waiting += [(f"training_{number}/", graph) for number, graph in enumerate(training)]
    for number, (prefix, scope) in enumerate(waiting):
        for place in _inside(scope, is_main=number == 0):
            yield _named(place, names.unique(prefix + place.inner))
        for node in scope.node:
            waiting.extend((f"{prefix}{nodes.label(node)}/{name}/", graph) for name, graph in nodes.graphs(node))


def _of_training(part: Any) -> Iterator[Any]:
    yield from (getattr(part, field) for field in ("initialization", "algorithm") if part.HasField(field))


def _named(place: Place, name: str) -> Place:
    return Place(name, place.inner, place.data_type, place.scope, place.is_main, place.node, place.dense, place.sparse)


def _inside(scope: Any, *, is_main: bool) -> Iterator[Place]:
    for tensor in getattr(scope, "initializer", ()):
        if tensor.data_type != STRING:
            yield Place("", tensor.name, tensor.data_type, scope, is_main, dense=tensor)
    for sparse in getattr(scope, "sparse_initializer", ()):
        yield Place("", sparse.values.name, sparse.values.data_type, scope, is_main, sparse=sparse)
    for node in scope.node:
        place = _constant(node, scope, is_main=is_main)
        if place is not None and place.data_type != STRING:
            yield place


def _constant(node: Any, scope: Any, *, is_main: bool) -> Place | None:
    """Return the array that a Constant node makes; none for a scalar or a list of whole numbers, as in the handler."""
    if node.op_type != "Constant" or not node.output:
        return None
    name = node.output[0]
    for attribute in node.attribute:
        if attribute.name == "value" and attribute.t.dims:
            return Place("", name, attribute.t.data_type, scope, is_main, node=node, dense=attribute.t)
        if attribute.name == "sparse_value":
            data_type = attribute.sparse_tensor.values.data_type
            return Place("", name, data_type, scope, is_main, node=node, sparse=attribute.sparse_tensor)
        if attribute.name == "value_floats":
            return Place("", name, _FLOAT, scope, is_main, node=node)
    return None
