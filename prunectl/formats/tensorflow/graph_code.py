"""Detection of effects that a SavedModel's graph would have besides pure computation, if TensorFlow loaded and ran it.

`tf.saved_model.load` runs initializers, and calls of signatures run the rest. Therefore every node is checked, of the
graph and of each function in its library, against an allow-list of operations (`formats.pure_names`). Two kinds of
operations depend on their callers: those that save variables must belong to the saver, which loading does not run, and
those that fill a table from a file must read an asset of the SavedModel.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from prunectl.errors import InputError
from prunectl.formats import budgets
from prunectl.formats.extents import mmap_file
from prunectl.formats.protobuf import (
    BYTES,
    VARINT,
    BudgetedReader,
    Field,
    WireError,
    encode_varint,
    fields,
    packed,
    read_varint,
)
from prunectl.formats.pure_names import BY_ATTRIBUTE, FROM_FILES, OPERATIONS, SAVING

_META_GRAPHS = 2
_GRAPH, _SAVER, _COLLECTIONS, _SIGNATURES, _OBJECTS = 2, 3, 4, 5, 7
_NODES, _LIBRARY, _FUNCTIONS = 1, 2, 1
_SIGNATURE, _FUNCTION_NODES, _NAME = 1, 3, 1
_OPERATION, _INPUT, _ATTRIBUTES = 2, 3, 5
_KEY, _VALUE, _STRING = 1, 2, 2
_OPERATION_TAG = _OPERATION << 3 | BYTES
_OUTPUTS, _TENSOR_NAME, _SPARSE, _COMPOSITE = 2, 1, 4, 5
_NODE_LIST, _BYTES_LIST = 1, 2
_RESTORE = 3
_RESTORING = b"RestoreV2"
_PURE = frozenset(name.encode() for name in OPERATIONS)
_SAVING = frozenset(name.encode() for name in SAVING)
_FROM_FILES = frozenset(name.encode() for name in FROM_FILES)
_BY_ATTRIBUTE = {
    name.encode(): (key.encode(), re.compile(pattern.encode(), re.DOTALL))
    for name, (key, pattern) in BY_ATTRIBUTE.items()
}
_ASSETS = 6
_INFO, _FILE_NAME, _ASSET_TENSOR = 1, 2, 1
_ANY_LIST, _ANY_VALUE = 5, 2
_OBJECT_NODES, _CONCRETE_FUNCTIONS, _IS_ASSET, _BOUND_INPUTS = 1, 2, 5, 2
_ARGUMENTS = 2
_FILE_INPUT = 1
"""Index of the operation's input that names the file."""


class Assets:
    """The asset files of a SavedModel, and the tensors that hold their paths once it is loaded."""

    def __init__(self, reader: BudgetedReader, meta: Field, folder: Path) -> None:
        self._reader, self._folder = reader, folder
        described = [*reader.messages(meta, _ASSETS), *self._tf1_assets(meta)]
        self._names = [_last(self._reader, asset, _FILE_NAME) for asset in described]
        self._tensors = {
            _last(self._reader, info, _ASSET_TENSOR).partition(b":")[0]
            for asset in described
            for info in reader.messages(asset, _INFO)
        }
        self._objects: list[bool] = []
        """Whether each object is an asset."""
        self._bound: dict[bytes, list[int]] = {}
        """Indices of the objects that loading binds to each function, as its last arguments."""
        for objects in reader.messages(meta, _OBJECTS):
            for node in reader.messages(objects, _OBJECT_NODES):
                self._objects.append(any(True for _ in reader.messages(node, _IS_ASSET)))
            for entry in reader.messages(objects, _CONCRETE_FUNCTIONS):
                self._bound[_last(self._reader, entry, _KEY)] = [
                    number
                    for value in reader.messages(entry, _VALUE)
                    for field in reader.fields(value)
                    if field.number == _BOUND_INPUTS and field.wire in {BYTES, VARINT}
                    for number in packed(reader.data, field)
                ]

    @property
    def are_inside(self) -> bool:
        """Whether every asset is a file inside the folder."""
        return all(self._is_inside(name.decode("utf-8", "replace")) for name in self._names)

    def is_path(self, node: Field) -> bool:
        """Whether the file that a node of the main graph reads is an asset."""
        return self._input(node, _FILE_INPUT).partition(b":")[0] in self._tensors

    def argument(self, function: Field, node: Field) -> int | None:
        """The argument of its function from which a node takes its path, as a negative index; None if there is none."""
        path = self._input(node, _FILE_INPUT)
        signatures = self._reader.messages(function, _SIGNATURE)
        arguments = [
            _last(self._reader, argument, _NAME)
            for signature in signatures
            for argument in self._reader.messages(signature, _ARGUMENTS)
        ]
        return arguments.index(path) - len(arguments) if path in arguments else None

    def is_bound(self, function: bytes, argument: int) -> bool:
        """Whether the object that loading binds to an argument (a negative index) of a function is an asset."""
        bound = self._bound.get(function, [])
        if -argument > len(bound):
            # No object is bound to the argument: the caller passes it.
            return True
        number = bound[argument]
        return number < len(self._objects) and self._objects[number]

    def is_given(self, call: Field, argument: int) -> bool:
        """Whether a call in the main graph passes an asset as an argument (a negative index)."""
        inputs = [name for name in self._inputs(call) if not name.startswith(b"^")]
        return -argument <= len(inputs) and inputs[argument].partition(b":")[0] in self._tensors

    def _is_inside(self, name: str) -> bool:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            return False
        asset = self._folder / "assets" / path
        return asset.is_file() and asset.resolve().is_relative_to(self._folder.resolve())

    def _tf1_assets(self, meta: Field) -> Iterator[Field]:
        """Yield the assets that TensorFlow 1 lists in a collection."""
        for collection in self._reader.messages(meta, _COLLECTIONS):
            if _last(self._reader, collection, _KEY) != b"saved_model_assets":
                continue
            for value in self._reader.messages(collection, _VALUE):
                for any_list in self._reader.messages(value, _ANY_LIST):
                    for entry in self._reader.messages(any_list, 1):
                        yield from self._reader.messages(entry, _ANY_VALUE)

    def _input(self, node: Field, number: int) -> bytes:
        inputs = self._inputs(node)
        return inputs[number] if number < len(inputs) else b""

    def _inputs(self, node: Field) -> list[bytes]:
        return list(_texts(self._reader, self._reader.messages(node, _INPUT)))


class GraphNode(NamedTuple):
    """A node whose operation is only harmless in some contexts."""

    operation: bytes
    field: Field


class Function(NamedTuple):
    """A function of the library."""

    name: bytes
    field: Field
    nodes: tuple[GraphNode, ...]
    """Nodes whose context must be checked."""


def find_code(folder: Path) -> tuple[str, ...]:
    """Descriptions of the effects of a SavedModel's graph beyond pure computation."""
    path = folder / "saved_model.pb"
    reader = BudgetedReader(mmap_file(path), budgets.MAX_GRAPH_FIELDS)
    try:
        metas = tuple(reader.messages(None, _META_GRAPHS))
        descriptions = [
            fact for meta in metas for fact in _MetaGraph(reader, meta, folder, is_alone=len(metas) == 1).facts()
        ]
    except WireError as error:
        raise InputError(f"{path} is refused: its graph holds {error}") from error
    return tuple(dict.fromkeys(descriptions))


class _MetaGraph:
    """A MetaGraph: the main graph and its functions, and which of their nodes are run."""

    def __init__(self, reader: BudgetedReader, meta: Field, folder: Path, *, is_alone: bool) -> None:
        self._reader, self._meta, self._folder = reader, meta, folder
        self._is_object_based = is_alone and any(True for _ in reader.messages(meta, _OBJECTS))
        """Whether TensorFlow loads its objects and functions, and runs no node of the main graph."""
        self._graphs = tuple(reader.messages(meta, _GRAPH))
        self._main: list[Field] = []
        self._special: list[GraphNode] = []
        """Nodes of the main graph whose context must be checked."""
        self._functions: list[Function] = []
        self._operations: set[bytes] = set()
        for graph in self._graphs:
            for field in reader.fields(graph):
                if field.number == _NODES and field.wire == BYTES:
                    self._main.append(field)
                elif field.number == _LIBRARY and field.wire == BYTES:
                    self._functions.extend(self._function(function) for function in reader.messages(field, _FUNCTIONS))
        self._special.extend(self._nodes_to_check(self._main))

    def facts(self) -> Iterator[str]:
        """Yield a description of each effect that is not harmless."""
        # Registered operations begin with a capital: a function named like one does not make the operation known.
        own = {function.name for function in self._functions if re.match(rb"[a-z]|__", function.name)}
        known = _PURE | _SAVING | _FROM_FILES | _BY_ATTRIBUTE.keys() | own
        yield from (_describe(operation) for operation in sorted(self._operations - known))
        nodes = [*self._special, *(node for function in self._functions for node in function.nodes)]
        yield from (_describe(node.operation) for node in nodes if not self._is_harmless_by_attribute(node))
        if self._is_saved_by_others():
            yield f"operation {_first_operation(nodes, _SAVING)} outside the functions that save the model"
        if any(node.operation in _FROM_FILES for node in nodes) and not self._is_filled_from_assets():
            yield f"operation {_first_operation(nodes, _FROM_FILES)} on a file that is not an asset of the model"

    def _function(self, definition: Field) -> Function:
        name, nodes = b"", []
        for field in self._reader.fields(definition):
            if field.number == _SIGNATURE and field.wire == BYTES:
                name = _last(self._reader, field, _NAME) or name
            elif field.number == _FUNCTION_NODES and field.wire == BYTES:
                nodes.append(field)
        return Function(name, definition, tuple(self._nodes_to_check(nodes)))

    def _nodes_to_check(self, nodes: Iterable[Field]) -> Iterator[GraphNode]:
        """Yield the nodes whose context must be checked, and collect the operations of all nodes."""
        for node in nodes:
            operation = operation_of(self._reader, node)
            self._operations.add(operation)
            if operation in _SAVING or operation in _FROM_FILES or operation in _BY_ATTRIBUTE:
                yield GraphNode(operation, node)

    def _is_harmless_by_attribute(self, node: GraphNode) -> bool:
        if node.operation not in _BY_ATTRIBUTE:
            return True
        key, pattern = _BY_ATTRIBUTE[node.operation]
        values = [
            list(_texts(self._reader, self._reader.messages(value, _STRING)))
            for attribute in self._reader.messages(node.field, _ATTRIBUTES)
            if _last(self._reader, attribute, _KEY) == key
            for value in self._reader.messages(attribute, _VALUE)
        ]
        return all(strings and all(map(pattern.fullmatch, strings)) for strings in values)

    def _is_saved_by_others(self) -> bool:
        """Whether nodes outside the saver, which loading or a caller runs, save or restore variables."""
        functions = {
            function.name: {node.operation for node in function.nodes} & _SAVING for function in self._functions
        }
        saving = {name: saving for name, saving in functions.items() if saving}
        nodes = {node.field: {node.operation} for node in self._special if node.operation in _SAVING}
        if not saving and not nodes:
            return False
        if not self._add_callers(saving, nodes):
            return True
        names = {message: _last(self._reader, message, _NAME) for message in nodes}
        consumers = self._consumers()
        touched = _closure(consumers, names.values())
        saved = _closure(consumers, (names[message] for message, kinds in nodes.items() if kinds != {_RESTORING}))
        savers = self._reader.messages(self._meta, _SAVER)
        restored = {_node_name(_last(self._reader, saver, _RESTORE)) for saver in savers}
        return bool(touched & self._run_nodes()) or bool(saved & restored)

    def _add_callers(self, saving: dict[bytes, set[bytes]], nodes: dict[Field, set[bytes]]) -> bool:
        """Add all direct and indirect callers of functions that save; False if one is outside of graph and library."""
        names = {function.field: function.name for function in self._functions}
        library, main = _Spans(names), _Spans(self._main)
        pending = list(saving)
        while pending:
            name = pending.pop()
            if len(saving) > budgets.MAX_SAVING_FUNCTIONS or not name:
                return False
            for offset in self._mentions(name):
                enclosing, call = library.around(offset), main.around(offset)
                if enclosing is not None:
                    caller = names[enclosing]
                    if not saving.get(caller, set()) >= saving[name]:
                        saving[caller] = saving.get(caller, set()) | saving[name]
                        pending.append(caller)
                elif call is not None:
                    nodes[call] = nodes.get(call, set()) | saving[name]
                else:
                    return False
        return True

    def _is_filled_from_assets(self) -> bool:
        """Whether every table that is filled from a file is filled from an asset, for every caller."""
        assets = Assets(self._reader, self._meta, self._folder)
        filling = {
            function: [node.field for node in function.nodes if node.operation in _FROM_FILES]
            for function in self._functions
        }
        paths = (node.field for node in self._special if node.operation in _FROM_FILES)
        return (
            assets.are_inside
            and (self._is_object_based or all(map(assets.is_path, paths)))
            and all(self._is_given_assets(assets, function, node) for function in filling for node in filling[function])
        )

    def _is_given_assets(self, assets: Assets, function: Function, node: Field) -> bool:
        argument = assets.argument(function.field, node)
        if argument is None or not assets.is_bound(function.name, argument):
            return False
        library = _Spans([other.field for other in self._functions if other.field != function.field])
        main = _Spans(self._main)
        for offset in self._mentions(function.name):
            call = None if self._is_object_based else main.around(offset)
            if library.around(offset) is not None or (call is not None and not assets.is_given(call, argument)):
                return False
        return True

    @cached_property
    def _bytes(self) -> bytes:
        """The bytes of the MetaGraph, in which mentions of a name are searched."""
        return bytes(self._reader.data[self._meta.begin : self._meta.end])

    def _mentions(self, name: bytes) -> Iterator[int]:
        """Yield the offsets at which a name is a string of its own, not the beginning of a longer one."""
        data, begin = self._reader.data, self._meta.begin
        length = encode_varint(len(name))
        offset = begin - 1
        # Occurrences may overlap.
        while (index := self._bytes.find(name, offset + 1 - begin)) >= 0:
            self._reader.spend(1)
            offset, end = begin + index, begin + index + len(name)
            is_prefix = end < self._meta.end and re.match(rb"[\w./-]", data[end : end + 1]) is not None
            before = bytes(data[max(0, offset - len(length)) : offset])
            # A length may also be a varint of more bytes than necessary, the last of which is then zero.
            if not is_prefix or before == length or before.endswith(b"\0"):
                yield offset

    def _consumers(self) -> dict[bytes, list[bytes]]:
        """The consumers of each node, by data or control inputs."""
        users: defaultdict[bytes, list[bytes]] = defaultdict(list)
        for node in self._main:
            name = _last(self._reader, node, _NAME)
            for source in self._reader.messages(node, _INPUT):
                users[_node_name(bytes(self._reader.data[source.begin : source.end]))].append(name)
        return users

    def _run_nodes(self) -> set[bytes]:
        """The nodes that loading or a caller runs, without those of the saver."""
        reader, names = self._reader, set[bytes]()
        for signature in reader.messages(self._meta, _SIGNATURES):
            for inner in reader.messages(signature, _VALUE):
                for output in reader.messages(inner, _OUTPUTS):
                    names.update(name for info in reader.messages(output, _VALUE) for name in _tensors(reader, info, 0))
        for collection in reader.messages(self._meta, _COLLECTIONS):
            if _last(reader, collection, _KEY) == b"savers":
                continue
            for value in reader.messages(collection, _VALUE):
                for listed in reader.messages(value, _NODE_LIST):
                    names.update(_node_name(text) for text in _texts(reader, reader.messages(listed, _NAME)))
                for listed in reader.messages(value, _BYTES_LIST):
                    for described in reader.messages(listed, _NAME):
                        names.update(_node_name(text) for text in _strings_in(reader, described))
        return names


class _Spans:
    """Lookup of messages by an offset inside them (binary search)."""

    def __init__(self, messages: Iterable[Field]) -> None:
        self._sorted = sorted(messages, key=lambda message: message.begin)
        self._begins = [message.begin for message in self._sorted]

    def around(self, offset: int) -> Field | None:
        """The message that encloses an offset."""
        index = bisect_right(self._begins, offset) - 1
        return self._sorted[index] if index >= 0 and offset < self._sorted[index].end else None


def operation_of(reader: BudgetedReader, node: Field) -> bytes:
    """The operation of a node (as in protobuf, the last field counts); optimized, as it is called for every node."""
    data, offset, end, count = reader.data, node.begin, node.end, 0
    begin = stop = 0
    while offset < end:
        tag = data[offset]
        offset += 1
        count += 1
        if tag & 0x87 != BYTES or tag < 8:
            # An uncommon field.
            field = next(fields(data, offset - 1, end))
            if field.number == _OPERATION and field.wire == BYTES:
                begin, stop = field.begin, field.end
            offset = field.end
            continue
        length = data[offset] if offset < end else 0x80
        offset += 1
        if length >= 0x80:
            length, offset = read_varint(data, offset - 1, end)
        if tag == _OPERATION_TAG:
            begin, stop = offset, offset + length
        offset += length
    if offset > end:
        raise WireError("a field reaches past the end of its message")
    reader.spend(count)
    return bytes(data[begin:stop])


def _closure(consumers: dict[bytes, list[bytes]], names: Iterable[bytes]) -> set[bytes]:
    reached, pending = set(), list(names)
    while pending:
        name = pending.pop()
        if name not in reached:
            reached.add(name)
            pending.extend(consumers.get(name, ()))
    return reached


def _tensors(reader: BudgetedReader, info: Field, depth: int) -> Iterator[bytes]:
    """Yield the nodes of a signature's tensor, which may be sparse or composite and so have several."""
    if depth > 2:
        raise WireError("a signature that is nested too deep")
    yield from (_node_name(name) for name in _texts(reader, reader.messages(info, _TENSOR_NAME)))
    for sparse in reader.messages(info, _SPARSE):
        yield from (_node_name(name) for name in _strings_in(reader, sparse))
    for composite in reader.messages(info, _COMPOSITE):
        for part in reader.messages(composite, _VALUE):
            yield from _tensors(reader, part, depth + 1)


def _strings_in(reader: BudgetedReader, message: Field) -> Iterator[bytes]:
    """Yield the strings of a message, such as the names in the definition of a variable."""
    try:
        yield from _texts(reader, (field for field in reader.fields(message) if field.wire == BYTES))
    except WireError:
        # Not a message, but text: TensorFlow looks for no nodes in it.
        return


def _texts(reader: BudgetedReader, strings: Iterable[Field]) -> Iterator[bytes]:
    return (bytes(reader.data[string.begin : string.end]) for string in strings)


def _last(reader: BudgetedReader, message: Field, number: int) -> bytes:
    last = b""
    for last in _texts(reader, reader.messages(message, number)):  # noqa: B007 - the last one counts
        pass
    return last


def _node_name(name: bytes) -> bytes:
    """The name of the node of an input or tensor: `a` for `^a` and `a:0`."""
    return name.removeprefix(b"^").partition(b":")[0]


def _first_operation(nodes: Iterable[GraphNode], operations: Collection[bytes]) -> str:
    return next(node.operation.decode() for node in nodes if node.operation in operations)


def _describe(operation: bytes) -> str:
    return f"operation {operation.decode('utf-8', 'backslashreplace')}"
