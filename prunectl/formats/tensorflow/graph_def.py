"""Read `saved_model.pb`: producer, Keras objects, signatures, constants, and the variables that functions use."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from prunectl.errors import InputError
from prunectl.formats import budgets
from prunectl.formats.base import NameAllocator, Role, Storage, Tensor
from prunectl.formats.extents import Extent, mmap_file
from prunectl.formats.protobuf import BYTES, BudgetedReader, Field, WireError, text
from prunectl.formats.tensorflow.bundle import DTYPES, read_shape

_META_GRAPHS = 2
_INFO, _GRAPH, _SIGNATURES, _ASSETS, _OBJECTS = 1, 2, 5, 6, 7
_SIGNATURE_NAME = 1
_VERSION = 5
_OBJECT_NODES, _USER_OBJECT = 1, 4
_IDENTIFIER, _METADATA = 1, 3
_KERAS_NODES, _KERAS_IDENTIFIER, _KERAS_METADATA = 1, 4, 5
_NODES, _LIBRARY, _FUNCTIONS = 1, 2, 1
_FUNCTION_SIGNATURE, _FUNCTION_NAME, _FUNCTION_NODES = 1, 1, 3
_NODE_NAME, _NODE_OPERATION, _NODE_INPUT, _NODE_ATTRIBUTES = 1, 2, 3, 5
_ATTRIBUTE_KEY, _ATTRIBUTE_VALUE = 1, 2
_VALUE_STRING, _VALUE_TENSOR, _VALUE_FUNCTION, _CALLED_NAME = 2, 8, 10, 1


@dataclass(frozen=True, slots=True)
class KerasObject:
    """A Keras model, layer or metric, as TensorFlow describes it."""

    identifier: str
    """Its class; empty if missing or too long."""
    metadata: bytes
    """A JSON object."""


@dataclass(frozen=True, slots=True)
class SavedGraph:
    """The parsed facts of a SavedModel, and the reader of its bytes."""

    path: Path
    reader: BudgetedReader
    version: str
    objects: tuple[KerasObject, ...]
    graphs: tuple[Field, ...]
    """Where each GraphDef lies."""
    signatures: tuple[str, ...] = ()
    assets: int = 0
    """Files that the graph reads, such as vocabularies."""


def read_graph(path: Path) -> SavedGraph:
    """Read `saved_model.pb`, the nodes of its graphs left alone."""
    reader = BudgetedReader(mmap_file(path))
    try:
        metas = tuple(reader.messages(None, _META_GRAPHS))
        infos = [info for meta in metas for info in reader.messages(meta, _INFO)]
        graphs = tuple(graph for meta in metas for graph in reader.messages(meta, _GRAPH))
        versions = [text(reader.data, version) for info in infos for version in reader.messages(info, _VERSION)]
        parts = [part for meta in metas for part in reader.messages(meta, _OBJECTS)]
        nodes = (node for part in parts for node in reader.messages(part, _OBJECT_NODES))
        users = (user for node in nodes for user in reader.messages(node, _USER_OBJECT))
        objects = _keras_objects(reader, users, _IDENTIFIER, _METADATA)
        signed = [signature for meta in metas for signature in reader.messages(meta, _SIGNATURES)]
        signatures = [text(reader.data, name) for entry in signed for name in reader.messages(entry, _SIGNATURE_NAME)]
        assets = sum(1 for meta in metas for _ in reader.messages(meta, _ASSETS))
    except WireError as error:
        raise InputError(f"{path} is truncated or damaged: it is not a SavedModel ({error})") from error
    if not graphs:
        raise InputError(f"{path} is damaged: it holds no graph")
    return SavedGraph(path, reader, next(iter(versions), ""), objects, graphs, tuple(signatures), assets)


def read_keras_metadata(path: Path) -> tuple[KerasObject, ...]:
    """Read `keras_metadata.pb`, where Keras 2.5 and later describe their layers."""
    reader = BudgetedReader(mmap_file(path))
    try:
        return _keras_objects(reader, reader.messages(None, _KERAS_NODES), _KERAS_IDENTIFIER, _KERAS_METADATA)
    except WireError as error:
        raise InputError(f"{path} is truncated or damaged: it is not Keras metadata ({error})") from error


def _keras_objects(
    reader: BudgetedReader, nodes: Iterable[Field], identifier: int, metadata: int
) -> tuple[KerasObject, ...]:
    objects, total = [], 0
    for node in nodes:
        texts = {field.number: field for field in reader.fields(node) if field.wire == BYTES}
        nbytes = texts[metadata].value if metadata in texts else 0
        total += nbytes
        if nbytes > budgets.MAX_KERAS_METADATA_BYTES or total > budgets.MAX_JSON_BYTES:
            raise WireError(f"a description of {nbytes} bytes")
        if nbytes:
            # Keras rebuilds what is described in a file of its saver, whatever it is called there, or if it is not.
            is_named = identifier in texts and texts[identifier].value <= budgets.MAX_MARK_BYTES
            name = text(reader.data, texts[identifier]) if is_named else ""
            objects.append(KerasObject(name, bytes(reader.data[texts[metadata].begin : texts[metadata].end])))
    return tuple(objects)


MIN_WHOLE_NUMBERS = 1024
"""Fewer bytes of whole numbers than this are shapes and axes."""
_DTYPE, _SHAPE, _CONTENT = 1, 2, 4


def constants(graph: SavedGraph) -> tuple[Tensor, ...]:
    """The constants that are stored as plain runs of bytes."""
    allocator = NameAllocator()
    tensors = []
    for scope, node in _all_nodes(graph.reader, graph.graphs):
        constant = _constant(graph.reader, scope, node)
        if constant is not None:
            name, shape, code, content = constant
            tensors.append(_tensor(graph, allocator.unique(name), shape, code, content))
    return tuple(tensors)


def _all_nodes(reader: BudgetedReader, graphs: Iterable[Field]) -> Iterator[tuple[str, Field]]:
    for definition in graphs:
        for node in reader.messages(definition, _NODES):
            yield "", node
        for library in reader.messages(definition, _LIBRARY):
            for function in reader.messages(library, _FUNCTIONS):
                scope = ""
                for signature in reader.messages(function, _FUNCTION_SIGNATURE):
                    for name in reader.messages(signature, _FUNCTION_NAME):
                        scope = text(reader.data, name) + "/"
                for node in reader.messages(function, _FUNCTION_NODES):
                    yield scope, node


def _constant(reader: BudgetedReader, scope: str, node: Field) -> tuple[str, tuple[int, ...], int, Field] | None:
    name, operation, tensor = "", "", None
    for field in reader.fields(node):
        if field.number == _NODE_NAME and field.wire == BYTES:
            name = text(reader.data, field)
        elif field.number == _NODE_OPERATION and field.wire == BYTES:
            operation = text(reader.data, field)
            if operation != "Const":
                return None
        elif field.number == _NODE_ATTRIBUTES and field.wire == BYTES:
            tensor = _tensor_of(reader, field) or tensor
    if operation != "Const" or tensor is None:
        return None
    shape, code, content = tensor
    if code not in DTYPES or content.value != math.prod(shape) * DTYPES[code].itemsize:
        return None
    is_number = DTYPES[code].kind == "f" or "float" in DTYPES[code].name
    is_weight = bool(shape) and (is_number or content.value >= MIN_WHOLE_NUMBERS)
    return (scope + name, shape, code, content) if is_weight else None


def _tensor_of(reader: BudgetedReader, attribute: Field) -> tuple[tuple[int, ...], int, Field] | None:
    for value in reader.messages(attribute, _ATTRIBUTE_VALUE):
        for tensor in reader.messages(value, _VALUE_TENSOR):
            shape: tuple[int, ...] = ()
            code, content = 0, None
            for field in reader.fields(tensor):
                if field.number == _DTYPE:
                    code = field.value
                elif field.number == _SHAPE and field.wire == BYTES:
                    shape = read_shape(reader.data, field)
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


_CALLS = frozenset({"PartitionedCall", "StatefulPartitionedCall"})
_SAVER_FUNCTIONS = ("traced_save", "traced_restore")


@dataclass(frozen=True, slots=True)
class _Node:
    name: str
    operation: str
    inputs: tuple[str, ...]
    shared_name: str
    function: str


def variables_used_by_functions(graph: SavedGraph) -> frozenset[str]:
    """Names of variables passed to any function other than those that save and restore."""
    try:
        nodes = [
            _node(graph.reader, node)
            for definition in graph.graphs
            for node in graph.reader.messages(definition, _NODES)
        ]
    except WireError as error:
        raise InputError(f"{graph.path} is damaged: its graph holds {error}") from error
    handles = {node.name: node.shared_name for node in nodes if node.operation == "VarHandleOp"}
    calls = (
        node
        for node in nodes
        if node.operation in _CALLS and not any(saver in node.function for saver in _SAVER_FUNCTIONS)
    )
    return frozenset(handles[name] for call in calls for name in call.inputs if name in handles)


def _node(reader: BudgetedReader, node: Field) -> _Node:
    name = operation = shared_name = function = ""
    inputs = []
    for field in reader.fields(node):
        if field.wire != BYTES:
            continue
        if field.number == _NODE_NAME:
            name = text(reader.data, field)
        elif field.number == _NODE_OPERATION:
            operation = text(reader.data, field)
        elif field.number == _NODE_INPUT:
            inputs.append(text(reader.data, field).lstrip("^").partition(":")[0])
        elif field.number == _NODE_ATTRIBUTES and operation in {"VarHandleOp", *_CALLS}:
            key = "".join(text(reader.data, string) for string in reader.messages(field, _ATTRIBUTE_KEY))
            for value in reader.messages(field, _ATTRIBUTE_VALUE):
                if key == "shared_name":
                    shared_name = "".join(text(reader.data, string) for string in reader.messages(value, _VALUE_STRING))
                for called in reader.messages(value, _VALUE_FUNCTION):
                    function += "".join(text(reader.data, string) for string in reader.messages(called, _CALLED_NAME))
    return _Node(name, operation, tuple(inputs), shared_name, function)
