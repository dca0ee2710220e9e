"""Constants in the graph of a SavedModel that has no variables: the weights of a frozen model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from prunectl.formats.base import Role, Storage, Tensor
from prunectl.formats.distinct import Distinct
from prunectl.formats.extents import Extent
from prunectl.formats.protobuf import BYTES, Field, text
from prunectl.formats.tensorflow.dtypes import DTYPES, read_shape
from prunectl.formats.tensorflow.saved_model_graph import SavedGraph
from prunectl.formats.walk import Walk

MIN_WHOLE_NUMBERS = 1024
"""Fewer bytes of whole numbers than this are shapes and axes."""
_NODES, _LIBRARY, _FUNCTIONS = 1, 2, 1
_SIGNATURE, _SIGNATURE_NAME, _FUNCTION_NODES = 1, 1, 3
_NAME, _OPERATION, _ATTRIBUTES = 1, 2, 5
_KEY, _VALUE, _TENSOR = 1, 2, 8
_DTYPE, _SHAPE, _CONTENT = 1, 2, 4


def constants(graph: SavedGraph) -> tuple[Tensor, ...]:
    """Return the constants that are stored as plain runs of bytes."""
    distinct = Distinct()
    found = []
    for scope, node in _all_nodes(graph.walk, graph.graphs):
        constant = _constant(graph.walk, scope, node)
        if constant is not None:
            name, shape, code, content = constant
            found.append(_tensor(graph, distinct.name(name), shape, code, content))
    return tuple(found)


def _all_nodes(walk: Walk, graphs: Iterable[Field]) -> Iterator[tuple[str, Field]]:
    for definition in graphs:
        for node in walk.messages(definition, _NODES):
            yield "", node
        for library in walk.messages(definition, _LIBRARY):
            for function in walk.messages(library, _FUNCTIONS):
                scope = ""
                for signature in walk.messages(function, _SIGNATURE):
                    for name in walk.messages(signature, _SIGNATURE_NAME):
                        scope = text(walk.data, name) + "/"
                for node in walk.messages(function, _FUNCTION_NODES):
                    yield scope, node


def _constant(walk: Walk, scope: str, node: Field) -> tuple[str, tuple[int, ...], int, Field] | None:
    name, operation, tensor = "", "", None
    for field in walk.fields(node):
        if field.number == _NAME and field.wire == BYTES:
            name = text(walk.data, field)
        elif field.number == _OPERATION and field.wire == BYTES:
            operation = text(walk.data, field)
            if operation != "Const":
                return None
        elif field.number == _ATTRIBUTES and field.wire == BYTES:
            tensor = _tensor_of(walk, field) or tensor
    if operation != "Const" or tensor is None:
        return None
    shape, code, content = tensor
    if code not in DTYPES or content.value != math.prod(shape) * DTYPES[code].itemsize:
        return None
    is_number = DTYPES[code].kind == "f" or "float" in DTYPES[code].name
    is_weight = bool(shape) and (is_number or content.value >= MIN_WHOLE_NUMBERS)
    return (scope + name, shape, code, content) if is_weight else None


def _tensor_of(walk: Walk, attribute: Field) -> tuple[tuple[int, ...], int, Field] | None:
    for value in walk.messages(attribute, _VALUE):
        for tensor in walk.messages(value, _TENSOR):
            shape: tuple[int, ...] = ()
            code, content = 0, None
            for field in walk.fields(tensor):
                if field.number == _DTYPE:
                    code = field.value
                elif field.number == _SHAPE and field.wire == BYTES:
                    shape = read_shape(walk.data, field)
                elif field.number == _CONTENT and field.wire == BYTES:
                    content = field
            if content is not None and content.value:
                return shape, code, content
    return None


def _tensor(graph: SavedGraph, name: str, shape: tuple[int, ...], code: int, content: Field) -> Tensor:
    is_kernel = len(shape) >= 2 and (DTYPES[code].kind == "f" or "float" in DTYPES[code].name)
    extent = Extent(graph.path, content.begin, content.value)
    return Tensor(
        name=name,
        layer=name.rpartition("/")[0] or name,
        shape=shape,
        dtype=DTYPES[code],
        role=Role.KERNEL if is_kernel else Role.OTHER,
        storage=Storage(name, content.value, extent, content.value),
        kind="Const",
        out_axis=len(shape) - 1 if is_kernel else None,
    )
