"""A pickle program as what makes each of its values, so that it can be changed and written again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

Bytes = bytes | memoryview

MARK = b"("
FROM_MARK = frozenset({ord("t"), ord("l"), ord("d"), ord("i"), ord("o"), 0x91})
"""Opcodes that make a value of all that stands after a mark."""
EMPTY = frozenset({ord(")"), ord("]"), ord("}"), 0x8F})
"""Opcodes that make an empty container."""
DEED_FROM_MARK = frozenset({ord("e"), ord("u"), 0x90})
TAKES = {0x85: 1, 0x86: 2, 0x87: 3, ord("R"): 2, 0x81: 2, 0x92: 3, 0x93: 2, ord("Q"): 1}
"""Opcodes that make a value of a fixed number of others."""
DEED_TAKES = {ord("a"): 1, ord("s"): 2, ord("b"): 1}


@dataclass(slots=True, eq=False)
class Deed:
    """Something that is done to a value once it is made: items, entries, a state."""

    code: int
    parts: list[Node]


@dataclass(slots=True, eq=False)
class Node:
    """A value, by the instruction that makes it and the values that this takes."""

    raw: Bytes
    """The instruction as it stands in the program."""
    parts: list[Node] = field(default_factory=list)
    deeds: list[Deed] = field(default_factory=list)

    @property
    def code(self) -> int:
        """The opcode that makes the value."""
        return self.raw[0]

    @property
    def is_atom(self) -> bool:
        """Whether it is a number, a text, bytes, None or the name of a class."""
        return not self.parts and self.code not in EMPTY and self.code not in FROM_MARK

    def below(self) -> Iterator[Node]:
        """Yield every value that this one is made of or filled with."""
        yield from self.parts
        for deed in self.deeds:
            yield from deed.parts


@dataclass(slots=True)
class Recipe:
    """A whole program."""

    root: Node
    protocol: bytes
    """The instruction that says the protocol; nothing in the oldest programs."""
    end: int
    """Where the bytes after the program begin."""


def reachable(root: Node) -> dict[int, Node]:
    """Return every value that takes part in one, by identity, in the order in which they are met."""
    found = {id(root): root}
    todo = [root.below()]
    while todo:
        node = next(todo[-1], None)
        if node is None:
            todo.pop()
        elif id(node) not in found:
            found[id(node)] = node
            todo.append(node.below())
    return found
