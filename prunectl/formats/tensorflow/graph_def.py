"""What `saved_model.pb` says around the variables: who wrote it, its Keras layers, its constants."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from prunectl.errors import InputError
from prunectl.formats.base import NameAllocator, Role, Storage, Tensor
from prunectl.formats.extents import Extent, mmap_file
from prunectl.formats.protobuf import BYTES, BudgetedReader, Field, WireError, text
from prunectl.formats.tensorflow.bundle import DTYPES, read_shape

MAX_METADATA_BYTES = 8 << 20
"""Of one object; once parsed it takes many times as much."""
MAX_ALL_METADATA_BYTES = 64 << 20
MAX_IDENTIFIER_BYTES = 1 << 10

_META_GRAPHS = 2
_INFO, _GRAPH, _SIGNATURES, _ASSETS, _OBJECTS = 1, 2, 5, 6, 7
_SIGNATURE_NAME = 1
_VERSION = 5
_OBJECT_NODES, _USER_OBJECT = 1, 4
_IDENTIFIER, _METADATA = 1, 3
_KERAS_NODES, _KERAS_IDENTIFIER, _KERAS_METADATA = 1, 4, 5


@dataclass(frozen=True, slots=True)
class KerasObject:
    """A Keras model, layer or metric, as TensorFlow describes it."""

    identifier: str
    """What kind it is; nothing if that is not said, or in a text too long to be one."""
    metadata: bytes
    """A JSON object."""


@dataclass(frozen=True, slots=True)
class SavedGraph:
    """The facts of a SavedModel, and the walk through its bytes."""

    path: Path
    walk: BudgetedReader
    version: str
    objects: tuple[KerasObject, ...]
    graphs: tuple[Field, ...]
    """Where each GraphDef lies."""
    signatures: tuple[str, ...] = ()
    assets: int = 0
    """Files that the graph reads, such as vocabularies."""


def read_graph(path: Path) -> SavedGraph:
    """Read `saved_model.pb`, the nodes of its graphs left alone."""
    walk = BudgetedReader(mmap_file(path))
    try:
        metas = tuple(walk.messages(None, _META_GRAPHS))
        infos = [info for meta in metas for info in walk.messages(meta, _INFO)]
        graphs = tuple(graph for meta in metas for graph in walk.messages(meta, _GRAPH))
        versions = [text(walk.data, version) for info in infos for version in walk.messages(info, _VERSION)]
        parts = [part for meta in metas for part in walk.messages(meta, _OBJECTS)]
        nodes = (node for part in parts for node in walk.messages(part, _OBJECT_NODES))
        users = (user for node in nodes for user in walk.messages(node, _USER_OBJECT))
        objects = _keras_objects(walk, users, _IDENTIFIER, _METADATA)
        signed = [signature for meta in metas for signature in walk.messages(meta, _SIGNATURES)]
        signatures = [text(walk.data, name) for found in signed for name in walk.messages(found, _SIGNATURE_NAME)]
        assets = sum(1 for meta in metas for _ in walk.messages(meta, _ASSETS))
    except WireError as error:
        raise InputError(f"{path} is truncated or damaged: it is not a SavedModel ({error})") from error
    if not graphs:
        raise InputError(f"{path} is damaged: it holds no graph")
    return SavedGraph(path, walk, next(iter(versions), ""), objects, graphs, tuple(signatures), assets)


def read_keras_metadata(path: Path) -> tuple[KerasObject, ...]:
    """Read `keras_metadata.pb`, where Keras 2.5 and later describe their layers."""
    walk = BudgetedReader(mmap_file(path))
    try:
        return _keras_objects(walk, walk.messages(None, _KERAS_NODES), _KERAS_IDENTIFIER, _KERAS_METADATA)
    except WireError as error:
        raise InputError(f"{path} is truncated or damaged: it is not Keras metadata ({error})") from error


def _keras_objects(
    walk: BudgetedReader, nodes: Iterable[Field], identifier: int, metadata: int
) -> tuple[KerasObject, ...]:
    found, total = [], 0
    for node in nodes:
        texts = {field.number: field for field in walk.fields(node) if field.wire == BYTES}
        nbytes = texts[metadata].value if metadata in texts else 0
        total += nbytes
        if nbytes > MAX_METADATA_BYTES or total > MAX_ALL_METADATA_BYTES:
            raise WireError(f"a description of {nbytes} bytes")
        if nbytes:
            # Keras rebuilds what is described in a file of its own, whatever it is called there, or if it is not.
            is_named = identifier in texts and texts[identifier].value <= MAX_IDENTIFIER_BYTES
            name = text(walk.data, texts[identifier]) if is_named else ""
            found.append(KerasObject(name, bytes(walk.data[texts[metadata].begin : texts[metadata].end])))
    return tuple(found)


MIN_WHOLE_NUMBERS = 1024
"""Fewer bytes of whole numbers than this are shapes and axes."""
_CONSTANT_NODES, _LIBRARY, _FUNCTIONS = 1, 2, 1
_SIGNATURE, _CONSTANTS_SIGNATURE, _FUNCTION_NODES = 1, 1, 3
_NODE_NAME, _NODE_OPERATION, _NODE_ATTRIBUTES = 1, 2, 5
_ATTRIBUTE_KEY, _ATTRIBUTE_VALUE, _TENSOR = 1, 2, 8
_DTYPE, _SHAPE, _CONTENT = 1, 2, 4


def constants(graph: SavedGraph) -> tuple[Tensor, ...]:
    """Return the constants that are stored as plain runs of bytes."""
    allocator = NameAllocator()
    found = []
    for scope, node in _all_nodes(graph.walk, graph.graphs):
        constant = _constant(graph.walk, scope, node)
        if constant is not None:
            name, shape, code, content = constant
            found.append(_tensor(graph, allocator.unique(name), shape, code, content))
    return tuple(found)


def _all_nodes(walk: BudgetedReader, graphs: Iterable[Field]) -> Iterator[tuple[str, Field]]:
    for definition in graphs:
        for node in walk.messages(definition, _CONSTANT_NODES):
            yield "", node
        for library in walk.messages(definition, _LIBRARY):
            for function in walk.messages(library, _FUNCTIONS):
                scope = ""
                for signature in walk.messages(function, _SIGNATURE):
                    for name in walk.messages(signature, _CONSTANTS_SIGNATURE):
                        scope = text(walk.data, name) + "/"
                for node in walk.messages(function, _FUNCTION_NODES):
                    yield scope, node


def _constant(walk: BudgetedReader, scope: str, node: Field) -> tuple[str, tuple[int, ...], int, Field] | None:
    name, operation, tensor = "", "", None
    for field in walk.fields(node):
        if field.number == _NODE_NAME and field.wire == BYTES:
            name = text(walk.data, field)
        elif field.number == _NODE_OPERATION and field.wire == BYTES:
            operation = text(walk.data, field)
            if operation != "Const":
                return None
        elif field.number == _NODE_ATTRIBUTES and field.wire == BYTES:
            tensor = _tensor_of(walk, field) or tensor
    if operation != "Const" or tensor is None:
        return None
    shape, code, content = tensor
    if code not in DTYPES or content.value != math.prod(shape) * DTYPES[code].itemsize:
        return None
    is_number = DTYPES[code].kind == "f" or "float" in DTYPES[code].name
    is_weight = bool(shape) and (is_number or content.value >= MIN_WHOLE_NUMBERS)
    return (scope + name, shape, code, content) if is_weight else None


def _tensor_of(walk: BudgetedReader, attribute: Field) -> tuple[tuple[int, ...], int, Field] | None:
    for value in walk.messages(attribute, _ATTRIBUTE_VALUE):
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


_READ_NODES = 1
_READ_NAME, _READ_OPERATION, _INPUT, _READ_ATTRIBUTES = 1, 2, 3, 5
_READ_KEY, _READ_VALUE, _STRING, _FUNCTION, _FUNCTION_NAME = 1, 2, 2, 10, 1
_CALLS = frozenset({"PartitionedCall", "StatefulPartitionedCall"})
_OWN = ("traced_save", "traced_restore")


@dataclass(frozen=True, slots=True)
class _Node:
    name: str
    operation: str
    inputs: tuple[str, ...]
    shared_name: str
    function: str


def variables_read(graph: SavedGraph) -> frozenset[str]:
    """Return the names of variables that are handed to a function other than those that save and restore."""
    try:
        nodes = [_node(graph.walk, node) for found in graph.graphs for node in graph.walk.messages(found, _READ_NODES)]
    except WireError as error:
        raise InputError(f"{graph.path} is damaged: its graph holds {error}") from error
    handles = {node.name: node.shared_name for node in nodes if node.operation == "VarHandleOp"}
    calls = (node for node in nodes if node.operation in _CALLS and not any(own in node.function for own in _OWN))
    return frozenset(handles[name] for call in calls for name in call.inputs if name in handles)


def _node(walk: BudgetedReader, node: Field) -> _Node:
    name = operation = shared_name = function = ""
    inputs = []
    for field in walk.fields(node):
        if field.wire != BYTES:
            continue
        if field.number == _READ_NAME:
            name = text(walk.data, field)
        elif field.number == _READ_OPERATION:
            operation = text(walk.data, field)
        elif field.number == _INPUT:
            inputs.append(text(walk.data, field).lstrip("^").partition(":")[0])
        elif field.number == _READ_ATTRIBUTES and operation in {"VarHandleOp", *_CALLS}:
            key = "".join(text(walk.data, found) for found in walk.messages(field, _READ_KEY))
            for value in walk.messages(field, _READ_VALUE):
                if key == "shared_name":
                    shared_name = "".join(text(walk.data, found) for found in walk.messages(value, _STRING))
                for called in walk.messages(value, _FUNCTION):
                    function += "".join(text(walk.data, found) for found in walk.messages(called, _FUNCTION_NAME))
    return _Node(name, operation, tuple(inputs), shared_name, function)
