"""The entries of recorded dictionaries, to be looked at and to be changed."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunectl.formats.torch.emit import emitted
from prunectl.formats.torch.program import follow
from prunectl.formats.torch.recipe import Deed, Node

Entry = tuple[Node, Node]

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
_NOWHERE = Path("the pickle")


def value(node: Node) -> Any:
    """Return what a small recipe makes, as the restricted machine sees it."""
    return follow(emitted(node), _NOWHERE, "a value").value


def text(node: Node) -> str | None:
    """Return a text; None for what is none."""
    if node.code == _TEXT:
        return bytes(node.raw[5:]).decode("utf-8", "backslashreplace")
    found = value(node) if node.is_atom else None
    return found if isinstance(found, str) else None


def called(node: Node) -> str:
    """Return the dotted path of the function or class that makes a value."""
    if node.code not in _CALLS or not node.parts:
        return ""
    function = node.parts[0]
    if function.code == ord("c"):
        return ".".join(bytes(function.raw[1:]).decode("utf-8", "backslashreplace").splitlines())
    if function.code == _NAMED_BY_STACK:
        return ".".join(name or "" for name in map(text, function.parts))
    return ""


def arguments(node: Node) -> list[Node]:
    """Return what a call is given."""
    if node.code not in _CALLS or len(node.parts) < 2:
        return []
    return node.parts[1].parts if node.parts[1].code in _TUPLES else []


def entries(node: Node) -> list[Entry] | None:
    """Return the entries of a dictionary; None for what is none."""
    found: list[Entry] = []
    if node.code == ord("d"):
        found += zip(node.parts[::2], node.parts[1::2], strict=True)
    elif node.code != ord("}"):
        if called(node) not in _DICTIONARIES:
            return None
        found += _listed(arguments(node))
    for deed in node.deeds:
        if deed.code in _SETS:
            found += zip(deed.parts[::2], deed.parts[1::2], strict=True)
    return found


def _listed(given: Sequence[Node]) -> list[Entry]:
    """Return the entries that an ordered dictionary of Python 2 is made from."""
    rows = items(given[0]) if given else []
    return [(row[0], row[1]) for row in map(items, rows) if len(row) == 2]


def items(node: Node) -> list[Node]:
    """Return the items of a list or a tuple."""
    if node.code in _TUPLES:
        return node.parts
    if node.code not in _LISTS:
        return []
    return [*node.parts, *(part for deed in node.deeds if deed.code in b"ae" for part in deed.parts)]


def replace_entries(node: Node, kept: Sequence[Entry]) -> None:
    """Give a dictionary other entries."""
    if node.code == ord("d"):
        node.raw, node.parts = b"}", []
    elif _listed(arguments(node)):
        node.parts = [node.parts[0], Node(b")")]
    others = [deed for deed in node.deeds if deed.code not in _SETS]
    filled = [Deed(ord("u"), [part for entry in kept for part in entry])] if kept else []
    node.deeds = [*filled, *others]


def texts(node: Node) -> dict[str, Node]:
    """Return the entries of a dictionary whose keys are texts."""
    return {name: item for key, item in entries(node) or () if (name := text(key)) is not None}


def text_node(words: str) -> Node:
    """Return the recipe of a text."""
    raw = words.encode("utf-8", "backslashreplace")
    return Node(bytes([_TEXT]) + struct.pack("<I", len(raw)) + raw)


def number_node(number: int) -> Node:
    """Return the recipe of a whole number that is not negative."""
    if number < 1 << 31:
        return Node(b"J" + struct.pack("<i", number))
    raw = number.to_bytes((number.bit_length() + 8) // 8, "little")
    return Node(b"\x8a" + bytes([len(raw)]) + raw)


def tuple_node(parts: Sequence[Node]) -> Node:
    """Return the recipe of a tuple."""
    return Node(b"t", list(parts)) if parts else Node(b")")
