"""Read `saved_model.pb`: producer, Keras objects, signatures, constants, and the variables that functions use."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

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
_FUNCTION_SIGNATURE, _FUNCTION_NAME, _FUNCTION_ARGUMENTS, _FUNCTION_NODES = 1, 1, 2, 3
_NODE_NAME, _NODE_OPERATION, _NODE_INPUT, _NODE_ATTRIBUTES = 1, 2, 3, 5
_ATTRIBUTE_KEY, _ATTRIBUTE_VALUE = 1, 2
_VALUE_STRING, _VALUE_BOOLEAN, _VALUE_TENSOR, _VALUE_FUNCTION, _CALLED_NAME = 2, 5, 8, 10, 1


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
    scopes = _scopes(graph.reader, graph.graphs)
    tensors = []
    for function, scope in scopes.items():
        for node in scope.nodes:
            constant = _constant(graph.reader, node)
            if constant is not None:
                name = allocator.unique(f"{function}/{constant.name}" if function else constant.name)
                tensors.append(_tensor(graph, name, constant, _use_of(scopes, function, constant.name)))
    return tuple(tensors)


def repeated(graph: SavedGraph, tensors: Iterable[Tensor]) -> dict[str, str]:
    """Constants that stand in several functions, each with the first of its numbers."""
    firsts: defaultdict[tuple[int, ...], list[Tensor]] = defaultdict(list)
    copies: dict[str, str] = {}

    def content(tensor: Tensor) -> memoryview:
        extent = tensor.storage.extent
        return graph.reader.data[extent.offset : extent.offset + extent.nbytes] if extent else memoryview(b"")

    for tensor in tensors:
        same = firsts[(tensor.storage.nbytes, *tensor.shape)]
        first = next((one for one in same[:_MOST_COMPARED] if content(one) == content(tensor)), None)
        if first is not None and first.role is tensor.role:
            copies[tensor.name] = first.name
        else:
            same.append(tensor)
    return copies


_MOST_COMPARED = 8


class _Use(NamedTuple):
    """An operation that takes a tensor."""

    node: str
    operation: str
    operand: int
    is_transposed: bool
    function: str


@dataclass(frozen=True, slots=True)
class _Scope:
    """The nodes of a graph or of a function, what they take, and the arguments of the function."""

    nodes: Sequence[Field]
    arguments: Sequence[str]
    uses: Mapping[str, Sequence[_Use]]


def _scopes(reader: BudgetedReader, graphs: Iterable[Field]) -> Mapping[str, _Scope]:
    """The main graph, under an empty name, and all functions."""
    main: list[Field] = []
    scopes: dict[str, _Scope] = {}
    for definition in graphs:
        main += reader.messages(definition, _NODES)
        for library in reader.messages(definition, _LIBRARY):
            for function in reader.messages(library, _FUNCTIONS):
                name, arguments = "", []
                for signature in reader.messages(function, _FUNCTION_SIGNATURE):
                    name = "".join(text(reader.data, field) for field in reader.messages(signature, _FUNCTION_NAME))
                    for argument in reader.messages(signature, _FUNCTION_ARGUMENTS):
                        arguments += [text(reader.data, field) for field in reader.messages(argument, _FUNCTION_NAME)]
                nodes = list(reader.messages(function, _FUNCTION_NODES))
                scopes[name] = _Scope(nodes, arguments, _uses(reader, nodes))
    return {"": _Scope(main, (), _uses(reader, main)), **scopes}


def _uses(reader: BudgetedReader, nodes: Iterable[Field]) -> Mapping[str, Sequence[_Use]]:
    uses: defaultdict[str, list[_Use]] = defaultdict(list)
    for node in (_node(reader, field) for field in nodes):
        for operand, source in enumerate(node.inputs):
            is_transposed = operand < len(_TRANSPOSED) and not node.settings.isdisjoint(_TRANSPOSED[operand])
            uses[source].append(_Use(node.name, node.operation, operand, is_transposed, node.function))
    return uses


def _use_of(scopes: Mapping[str, _Scope], function: str, name: str) -> _Use | None:
    """The operation that multiplies by a tensor or looks it up, be it in a function that it is passed to."""
    pending, seen = [(function, name)], set()
    while pending:
        place = pending.pop()
        if place in seen or place[0] not in scopes:
            continue
        seen.add(place)
        for use in scopes[place[0]].uses.get(place[1], ()):
            if use.operand in _PRODUCTS.get(use.operation, ()):
                return use
            if use.operation == "Identity":
                pending.append((place[0], use.node))
            elif use.function in scopes:
                pending += [
                    (use.function, one) for one in scopes[use.function].arguments[use.operand : use.operand + 1]
                ]
    return None


_TRANSPOSED = (frozenset({"transpose_a", "adj_x"}), frozenset({"transpose_b", "adj_y"}))
_MATRIX = frozenset({"MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"})
_LOOKUPS = frozenset({"Gather", "GatherV2"})
_FROM_OUTPUTS = frozenset({"Conv2DBackpropInput", "Conv3DBackpropInputV2"})
_PRODUCTS: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys((*_MATRIX, "Einsum"), (0, 1)),
    **dict.fromkeys(("Conv2D", "Conv3D", "DepthwiseConv2dNative", *_FROM_OUTPUTS), (1,)),
    **dict.fromkeys(_LOOKUPS, (0,)),
}
"""Operations, and which of their operands may be weights."""


class _Constant(NamedTuple):
    """A constant: the name of its node, its shape, the code of its type, and its bytes."""

    name: str
    shape: tuple[int, ...]
    code: int
    content: Field


def _constant(reader: BudgetedReader, node: Field) -> _Constant | None:
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
    return _Constant(name, shape, code, content) if is_weight else None


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


def _tensor(graph: SavedGraph, name: str, constant: _Constant, use: _Use | None) -> Tensor:
    _, shape, code, content = constant
    is_matrix = len(shape) >= 2 and (DTYPES[code].kind == "f" or "float" in DTYPES[code].name)
    role = Role.OTHER
    if is_matrix and use is not None:
        role = Role.EMBEDDING if use.operation in _LOOKUPS else Role.KERNEL
    extent = Extent(graph.path, content.begin, content.value)
    out_axis, in_axis = _axes(use, len(shape)) if use is not None and role is Role.KERNEL else (None, None)
    return Tensor(
        name=name,
        layer=name.rpartition("/")[0] or name,
        shape=shape,
        dtype=DTYPES[code],
        role=role,
        storage=Storage(name, content.value, extent, content.value),
        kind=use.operation if use is not None else "Const",
        out_axis=out_axis,
        in_axis=in_axis,
    )


def _axes(use: _Use, rank: int) -> tuple[int | None, int | None]:
    """The axes of outputs and of inputs, where an operation has some that are always the same."""
    if use.operation == "Einsum":
        return None, None
    if use.operation == "DepthwiseConv2dNative":  # [height, width, channels, multiplier]
        return rank - 2, rank - 1
    is_last = use.operation not in _FROM_OUTPUTS
    if use.operation in _MATRIX:
        is_last = (use.operand == 1) != use.is_transposed
    return (rank - 1, rank - 2) if is_last else (rank - 2, rank - 1)


_CALLS = frozenset({"PartitionedCall", "StatefulPartitionedCall"})
_LOOPS = frozenset({"While", "StatelessWhile"})
_SAVER_FUNCTIONS = ("traced_save", "traced_restore")


@dataclass(frozen=True, slots=True)
class _Node:
    name: str
    operation: str
    inputs: tuple[str, ...]
    shared_name: str
    function: str
    settings: frozenset[str]
    """What is set or switched on, such as that it transposes an operand."""


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
    name = operation = ""
    inputs = []
    settings: dict[str, str] = {}
    for field in reader.fields(node):
        if field.wire != BYTES:
            continue
        if field.number == _NODE_NAME:
            name = text(reader.data, field)
        elif field.number == _NODE_OPERATION:
            operation = text(reader.data, field)
        elif field.number == _NODE_INPUT:
            inputs.append(text(reader.data, field).lstrip("^").partition(":")[0])
        elif field.number == _NODE_ATTRIBUTES and operation in {"VarHandleOp", *_CALLS, *_LOOPS, *_MATRIX}:
            settings |= _setting(reader, field)
    function = settings.get("f") or settings.get("body", "")
    return _Node(name, operation, tuple(inputs), settings.get("shared_name", ""), function, frozenset(settings))


def _setting(reader: BudgetedReader, attribute: Field) -> dict[str, str]:
    """The text or the function behind the key of an attribute; nothing of one that is switched off."""
    key = "".join(text(reader.data, string) for string in reader.messages(attribute, _ATTRIBUTE_KEY))
    for value in reader.messages(attribute, _ATTRIBUTE_VALUE):
        for part in reader.fields(value):
            if part.number == _VALUE_STRING and part.wire == BYTES:
                return {key: text(reader.data, part)}
            if part.number == _VALUE_FUNCTION and part.wire == BYTES:
                return {key: "".join(text(reader.data, called) for called in reader.messages(part, _CALLED_NAME))}
            if part.number == _VALUE_BOOLEAN and part.value:
                return {key: ""}
    return {}
