"""Read `saved_model.pb`: producer, Keras objects, signatures, constants, and the variables that functions use."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from prunectl.errors import InputError
from prunectl.formats import budgets
from prunectl.formats.base import NameAllocator, Role, Storage, Tensor
from prunectl.formats.extents import Extent, mmap_file
from prunectl.formats.kernel_axes import depthwise_axes
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
    """The description of a Keras model, layer or metric in a SavedModel."""

    identifier: str
    """Its class; empty if missing or too long."""
    metadata: bytes
    """A JSON object."""


@dataclass(frozen=True, slots=True)
class SavedGraph:
    """Parsed parts of a `saved_model.pb`, and the reader of its bytes."""

    path: Path
    reader: BudgetedReader
    version: str
    objects: tuple[KerasObject, ...]
    graphs: tuple[Field, ...]
    """The byte range of each GraphDef."""
    signatures: tuple[str, ...] = ()
    assets: int = 0
    """Number of files that the graph reads, such as vocabularies."""


def read_graph(path: Path) -> SavedGraph:
    """Read `saved_model.pb`, without the nodes of its graphs."""
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
            # Keras rebuilds every object that its saver described, whatever its identifier is, or without one.
            is_named = identifier in texts and texts[identifier].value <= budgets.MAX_MARK_BYTES
            name = text(reader.data, texts[identifier]) if is_named else ""
            objects.append(KerasObject(name, bytes(reader.data[texts[metadata].begin : texts[metadata].end])))
    return tuple(objects)


MIN_WHOLE_NUMBERS = 1024
"""Constants of integers with fewer bytes than this are shapes and axes, not weights."""
_DTYPE, _SHAPE, _CONTENT = 1, 2, 4


def constants(graph: SavedGraph) -> tuple[tuple[Tensor, ...], dict[str, str]]:
    """The weights among the constants that are stored as raw bytes, and their duplicates, each with its original."""
    allocator = NameAllocator()
    scopes = _scopes(graph.reader, graph.graphs)
    uses = _uses(graph.reader, scopes)
    by_node: defaultdict[str, list[Tensor]] = defaultdict(list)
    tensors = []
    for function, scope in scopes.items():
        for node in scope.nodes:
            constant = _constant(graph.reader, node)
            if constant is not None:
                name = allocator.unique(f"{function}/{constant.name}" if function else constant.name)
                tensors.append(_tensor(graph, name, constant, uses.get((function, constant.name), ())))
                by_node[constant.name].append(tensors[-1])
    copies: dict[str, str] = {}
    for same_node in by_node.values():
        copies |= _copies(graph, same_node)
    return tuple(tensors), copies


def _copies(graph: SavedGraph, same_node: Sequence[Tensor]) -> dict[str, str]:
    """Duplicates of one node's constant, traced into several functions, each with an earlier one of the same use."""
    firsts: dict[tuple[object, ...], str] = {}
    copies: dict[str, str] = {}
    for tensor in same_node if len(same_node) > 1 else ():
        extent = tensor.storage.extent
        content = graph.reader.data[extent.offset : extent.offset + extent.nbytes] if extent else b""
        use = (tensor.role, tensor.out_axis, tensor.in_axis)
        digest = hashlib.sha256(content).digest()
        first = firsts.setdefault((tensor.shape, tensor.dtype, *use, digest), tensor.name)
        if first != tensor.name:
            copies[tensor.name] = first
    return copies


_NodeKey = tuple[str, str]
"""Name of a function (empty for the main graph), and of a node or an argument in it."""


class _Use(NamedTuple):
    """How an operation uses a tensor."""

    operation: str
    is_output_last: bool | None
    """True if the tensor's last axis is the outputs, and the one before the inputs; False if reversed; else None."""


@dataclass(frozen=True, slots=True)
class _Scope:
    """The nodes of a graph or of a function, and the arguments of the function."""

    nodes: Sequence[Field]
    arguments: Sequence[str]


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
                scopes[name] = _Scope(list(reader.messages(function, _FUNCTION_NODES)), arguments)
    return {"": _Scope(main, ()), **scopes}


def _uses(reader: BudgetedReader, scopes: Mapping[str, _Scope]) -> Mapping[_NodeKey, Collection[_Use]]:
    """The products and lookups that use each tensor, also in functions that it is passed to."""
    nodes = {function: [_node(reader, field) for field in scope.nodes] for function, scope in scopes.items()}
    sources = _sources(reader, scopes, nodes)
    pending = deque(
        ((function, node.inputs[operand]), _Use(node.operation, _is_output_last(node, operand)))
        for function in nodes
        for node in nodes[function]
        for operand in _PRODUCTS.get(node.operation, ())
        if operand < len(node.inputs)
    )
    uses: defaultdict[_NodeKey, dict[_Use, None]] = defaultdict(dict)
    while pending:
        reader.spend(1)
        key, use = pending.popleft()
        if use not in uses[key]:
            uses[key][use] = None
            pending += [(source, use) for source in sources.get(key, ())]
    return uses


def _sources(
    reader: BudgetedReader, scopes: Mapping[str, _Scope], nodes: Mapping[str, Sequence[_Node]]
) -> Mapping[_NodeKey, Sequence[_NodeKey]]:
    """The sources of tensors that operations only pass on, and of the arguments of functions."""
    sources: defaultdict[_NodeKey, list[_NodeKey]] = defaultdict(list)
    merges: list[tuple[_NodeKey, list[_NodeKey]]] = []
    for function, scope in scopes.items():
        constant_nodes = {
            node.name: field
            for node, field in zip(nodes[function], scope.nodes, strict=True)
            if node.operation == "Const"
        }
        for node in nodes[function]:
            key, inputs = (function, node.name), [(function, source) for source in node.inputs]
            if node.operation == "Merge":
                merges.append((key, inputs))
            elif _is_passed_on(reader, node, constant_nodes):
                sources[key] += inputs[:1]
            elif node.function in scopes:
                for argument, source in zip(scopes[node.function].arguments, inputs, strict=False):
                    sources[(node.function, argument)].append(source)
    for key, inputs in merges:
        # A loop variable that the loop does not change has the value that enters the loop.
        if len(inputs) > 1 and _origin(reader, sources, inputs[1]) == key:
            sources[key].append(inputs[0])
    return sources


def _is_passed_on(reader: BudgetedReader, node: _Node, constant_nodes: Mapping[str, Field]) -> bool:
    """Whether an operation returns its first operand, perhaps rounded, with the same last two axes."""
    if node.operation == "ExpandDims" and len(node.inputs) > 1:
        return node.inputs[1] in constant_nodes and _is_zero(reader, constant_nodes[node.inputs[1]])
    return node.operation in _PASSING


def _origin(reader: BudgetedReader, sources: Mapping[_NodeKey, Sequence[_NodeKey]], key: _NodeKey) -> _NodeKey:
    """The source of a tensor, through operations that only pass it on."""
    while len(keys := sources.get(key, ())) == 1:
        reader.spend(1)
        key = keys[0]
    return key


def _is_zero(reader: BudgetedReader, node: Field) -> bool:
    """Whether a constant is the whole number 0, stored in any way."""
    attributes = reader.messages(node, _NODE_ATTRIBUTES)
    values = (value for attribute in attributes for value in reader.messages(attribute, _ATTRIBUTE_VALUE))
    tensors = [tensor for value in values for tensor in reader.messages(value, _VALUE_TENSOR)]
    numbers = [field for tensor in tensors for field in reader.fields(tensor) if field.number not in {_DTYPE, _SHAPE}]
    return bool(tensors) and all(
        field.value <= _INT64_BYTES and not any(reader.data[field.begin : field.end])
        if field.wire == BYTES
        else not field.value
        for field in numbers
    )


def _is_output_last(node: _Node, operand: int) -> bool | None:
    if node.operation in _MATRIX:
        return (operand == 1) == node.settings.isdisjoint(_TRANSPOSED[operand])
    # A depthwise kernel is [height, width, channels, multiplier].
    return None if node.operation in {"Einsum", *_LOOKUPS} else node.operation not in _OUTPUT_BEFORE_LAST


_INT64_BYTES = 8
_PASSING = frozenset({"Identity", "Cast", "Enter", "Switch", "NextIteration"})
_TRANSPOSED = (frozenset({"transpose_a", "adj_x"}), frozenset({"transpose_b", "adj_y"}))
_MATRIX = frozenset({"MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"})
_LOOKUPS = frozenset({"Gather", "GatherV2"})
_OUTPUT_BEFORE_LAST = frozenset({"Conv2DBackpropInput", "Conv3DBackpropInputV2", "DepthwiseConv2dNative"})
_PRODUCTS: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys((*_MATRIX, "Einsum"), (0, 1)),
    **dict.fromkeys(("Conv2D", "Conv3D", *_OUTPUT_BEFORE_LAST), (1,)),
    **dict.fromkeys(_LOOKUPS, (0,)),
}
"""Operations, and the indices of their operands that may be weights."""


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


def _tensor(graph: SavedGraph, name: str, constant: _Constant, uses: Collection[_Use]) -> Tensor:
    _, shape, code, content = constant
    # A tensor with any lookup is an embedding, even if an output layer is tied to it.
    use = next((use for use in uses if use.operation in _LOOKUPS), next(iter(uses), None))
    is_matrix = len(shape) >= 2 and (DTYPES[code].kind == "f" or "float" in DTYPES[code].name)
    role = Role.OTHER
    if is_matrix and use is not None:
        role = Role.EMBEDDING if use.operation in _LOOKUPS else Role.KERNEL
    extent = Extent(graph.path, content.begin, content.value)
    out_axis, in_axis = _axes(uses, shape) if role is Role.KERNEL else (None, None)
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


def _axes(uses: Collection[_Use], shape: tuple[int, ...]) -> tuple[int | None, int | None]:
    """The axes of outputs and of inputs, if all uses agree on them."""
    rank = len(shape)
    depthwise = [depthwise_axes("", use.operation, shape) for use in uses]
    if depthwise and depthwise[0] is not None:
        return depthwise[0]
    orders = {use.is_output_last for use in uses}
    if orders == {True}:
        return rank - 1, rank - 2
    return (rank - 2, rank - 1) if orders == {False} else (None, None)


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
    """Names of attributes that are set or true, such as `transpose_b`."""


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
    """The key of an attribute with its text or function, or an empty string if it is true; empty if it is false."""
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
