"""Read and change nodes of a pickle IR: dictionaries, lists, strings, tensors and references to storages."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunectl.formats.torch import views
from prunectl.formats.torch.pickle.ir import Bytes, IRNode, Mutation, PickleIR, emitted, reachable
from prunectl.formats.torch.pickle.vm import interpret

Entry = tuple[IRNode, IRNode]

_TEXT = ord("X")
_NAMED_BY_STACK = 0x93
_CALLS = {ord("R"), 0x81}
_LISTS = {ord("]"), ord("l")}
_TUPLES = {ord("t"), 0x85, 0x86, 0x87}
_SETS = {ord("s"), ord("u")}
_DICTIONARIES = frozenset(
    {
        *("collections.OrderedDict", "collections.defaultdict", "collections.Counter"),
        *("builtins.dict", "__builtin__.dict"),
    }
)
_SHOWN_PATH = Path("the pickle")


def value_of(node: IRNode) -> Any:
    """The value that a small node makes, interpreted by the pickle VM."""
    return interpret(emitted(node), _SHOWN_PATH, "a value").value


def string_of(node: IRNode) -> str | None:
    """The string that a node makes; None if it makes anything else."""
    if node.code == _TEXT:
        return bytes(node.raw[5:]).decode("utf-8", "backslashreplace")
    atom = value_of(node) if node.is_atom else None
    return atom if isinstance(atom, str) else None


def called_name(node: IRNode) -> str:
    """The dotted path of the function or class that a node calls; empty if it calls none by name."""
    if node.code not in _CALLS or not node.parts:
        return ""
    function = node.parts[0]
    if function.code == ord("c"):
        return ".".join(bytes(function.raw[1:]).decode("utf-8", "backslashreplace").splitlines())
    if function.code == _NAMED_BY_STACK:
        return ".".join(name or "" for name in map(string_of, function.parts))
    return ""


def arguments(node: IRNode) -> list[IRNode]:
    """The positional arguments of a call."""
    if node.code not in _CALLS or len(node.parts) < 2:
        return []
    return node.parts[1].parts if node.parts[1].code in _TUPLES else []


def entries(node: IRNode) -> list[Entry] | None:
    """The entries of a dictionary; None if the node makes anything else."""
    pairs: list[Entry] = []
    if node.code == ord("d"):
        pairs += zip(node.parts[::2], node.parts[1::2], strict=True)
    elif node.code != ord("}"):
        if called_name(node) not in _DICTIONARIES:
            return None
        pairs += _listed_entries(arguments(node))
    for mutation in node.mutations:
        if mutation.code in _SETS:
            pairs += zip(mutation.parts[::2], mutation.parts[1::2], strict=True)
    return pairs


def _listed_entries(args: Sequence[IRNode]) -> list[Entry]:
    """The entries of an OrderedDict that Python 2 pickled as a call with a list of pairs."""
    rows = items(args[0]) if args else []
    return [(row[0], row[1]) for row in map(items, rows) if len(row) == 2]


def items(node: IRNode) -> list[IRNode]:
    """The items of a list or a tuple; empty for any other node."""
    if node.code in _TUPLES:
        return node.parts
    if node.code not in _LISTS:
        return []
    return [*node.parts, *(part for mutation in node.mutations if mutation.code in b"ae" for part in mutation.parts)]


def replace_entries(node: IRNode, kept: Sequence[Entry]) -> None:
    """Replace all entries of a dictionary."""
    if node.code == ord("d"):
        node.raw, node.parts = b"}", []
    elif _listed_entries(arguments(node)):
        node.parts = [node.parts[0], IRNode(b")")]
    others = [mutation for mutation in node.mutations if mutation.code not in _SETS]
    filled = [Mutation(ord("u"), [part for entry in kept for part in entry])] if kept else []
    node.mutations = [*filled, *others]


def dict_of(node: IRNode) -> dict[str, IRNode]:
    """The entries of a dictionary whose keys are strings."""
    return {name: item for key, item in entries(node) or () if (name := string_of(key)) is not None}


def text_node(characters: str) -> IRNode:
    """A node that makes a string."""
    raw = characters.encode("utf-8", "backslashreplace")
    return IRNode(bytes([_TEXT]) + struct.pack("<I", len(raw)) + raw)


def number_node(number: int) -> IRNode:
    """A node that makes a non-negative integer."""
    if number < 1 << 31:
        return IRNode(b"J" + struct.pack("<i", number))
    raw = number.to_bytes((number.bit_length() + 8) // 8, "little")
    return IRNode(b"\x8a" + bytes([len(raw)]) + raw)


def tuple_node(parts: Sequence[IRNode]) -> IRNode:
    """A node that makes a tuple."""
    return IRNode(b"t", list(parts)) if parts else IRNode(b")")


_PERSISTENT_ID = ord("Q")
_KEY, _COUNT = 2, 4


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A reference to a storage of the container, by a persistent id."""

    id: IRNode
    """The node of the persistent id: `("storage", class, key, location, count)`."""
    key: str


@dataclass(frozen=True, slots=True)
class NewStorage:
    """The new content of a storage."""

    nbytes: int
    itemsize: int
    raw: Callable[[], Iterator[Bytes]]


@dataclass(frozen=True, slots=True)
class CheckpointEdits:
    """Changes to a container: an edited pickle, and the keys of storages to drop, to replace or to add."""

    ir: PickleIR
    dropped: frozenset[str]
    new_storages: Mapping[str, NewStorage] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CheckpointContainer:
    """A checkpoint file: its pickle as an IR, and its storages."""

    ir: PickleIR
    name_of: Callable[[str], str]
    """The `Storage.key` in the `ModelFile` for the key of a storage in the pickle."""
    sizes: Mapping[str, int]
    """Bytes that each storage takes in the file, by its key in the pickle."""
    write: Callable[[Path, CheckpointEdits], None]


def storage_ref(node: IRNode) -> StorageRef | None:
    """The storage that a node refers to; None if it is no reference to a storage."""
    if node.code != _PERSISTENT_ID or len(node.parts[0].parts) <= _COUNT:
        return None
    id_node = node.parts[0]
    if string_of(id_node.parts[0]) != "storage" or not id_node.parts[_KEY].is_atom:
        return None
    key = string_of(id_node.parts[_KEY])
    return StorageRef(id_node, key if key is not None else str(value_of(id_node.parts[_KEY])))


def storage_refs(root: IRNode) -> list[StorageRef]:
    """Every reference to a storage among the nodes below a root, in depth-first order."""
    return [ref for node in reachable(root).values() if (ref := storage_ref(node)) is not None]


def storage_keys(node: IRNode) -> frozenset[str]:
    """The keys of all storages that a value refers to."""
    return frozenset(ref.key for ref in storage_refs(node))


def is_tensor(node: IRNode) -> bool:
    """Whether a value is a tensor, not a container of tensors."""
    path = called_name(node)
    return path.startswith(("torch._utils._rebuild_", "torch._tensor._rebuild_")) or path.endswith(".Parameter")


def with_storage(node: IRNode, key: str, shape: tuple[int, ...]) -> IRNode | None:
    """A tensor as a contiguous view of the whole of another storage; None if it is not a plain strided tensor."""
    args = arguments(node)
    if not args:
        return None
    if called_name(node) in views.VIEW_CALLS:
        ref = storage_ref(args[0])
        if ref is None:
            return None
        parts = [*ref.id.parts[:_KEY], text_node(key), ref.id.parts[3], number_node(math.prod(shape))]
        # The sixth field of older pickles names a part of the storage; None means all of it.
        parts += [IRNode(b"N")] * (len(ref.id.parts) - len(parts))
        strides = tuple_node([number_node(math.prod(shape[axis + 1 :])) for axis in range(len(shape))])
        persistent = IRNode(args[0].raw, [tuple_node(parts)])
        changed = [persistent, number_node(0), args[2], strides, *args[4:]]
    else:
        inner = with_storage(args[0], key, shape)
        if inner is None:
            return None
        changed = [inner, *args[1:]]
    return IRNode(node.raw, [node.parts[0], tuple_node(changed)], node.mutations)
