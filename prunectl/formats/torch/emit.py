"""Writes a recorded pickle program again: the same instructions, with only what is still wanted."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator

from prunectl.formats.torch import recipe
from prunectl.formats.torch.program import STOP
from prunectl.formats.torch.recipe import MARK, Bytes, Deed, Node, Recipe, reachable

_POP, _POP_MARK = b"0", b"1"
_NOTHING = b")"
"""The empty tuple, of which there is one."""
_MAX_INLINE_BYTES = 3
"""What is no longer than a look into the memo is written again instead."""


def emit(program: Recipe) -> Iterator[Bytes]:
    """Yield the bytes of a program that makes what the recipe says."""
    yield program.protocol
    yield from _Emitter(program.root).run(program.root)
    yield bytes([STOP])


def emitted(node: Node) -> bytes:
    """Return a program that makes one value."""
    return b"".join(emit(Recipe(node, b"", 0)))


class _Emitter:
    """What was written so far; a stack of what is still to do stands in for recursion, which has no such depth."""

    def __init__(self, root: Node) -> None:
        self.uses = Counter([id(root), *(id(part) for node in reachable(root).values() for part in node.below())])
        self.memo: dict[int, int] = {}
        self.todo: list[Node | Deed | Bytes | tuple[Node]] = []

    def run(self, root: Node) -> Iterator[Bytes]:
        """Yield the instructions that leave a value on the stack."""
        self.todo.append(root)
        while self.todo:
            step = self.todo.pop()
            if isinstance(step, Node):
                yield from self._begin(step)
            elif isinstance(step, Deed):
                is_marked = step.code in recipe.DEED_FROM_MARK
                self.todo += [bytes([step.code]), *reversed(step.parts)]
                yield MARK if is_marked else b""
            elif isinstance(step, tuple):
                yield from self._make(step[0])
            else:
                yield step

    def _begin(self, node: Node) -> Iterator[Bytes]:
        if id(node) in self.memo:
            yield _numbered(b"h", b"j", self.memo[id(node)])
            return
        self.todo += [(node,), *reversed(node.parts)]
        if node.code in recipe.FROM_MARK:
            yield MARK

    def _make(self, node: Node) -> Iterator[Bytes]:
        if id(node) in self.memo:
            # A value inside itself: it was made while its own parts were.
            yield _POP_MARK if node.code in recipe.FROM_MARK else _POP * len(node.parts)
            yield _numbered(b"h", b"j", self.memo[id(node)])
            return
        yield node.raw
        is_short = (node.is_atom or node.raw == _NOTHING) and len(node.raw) <= _MAX_INLINE_BYTES
        if node.deeds or (self.uses[id(node)] > 1 and not is_short):
            self.memo[id(node)] = len(self.memo)
            yield _numbered(b"q", b"r", self.memo[id(node)])
        self.todo += reversed(node.deeds)


def _numbered(short: bytes, long: bytes, number: int) -> bytes:
    return short + bytes([number]) if number < 256 else long + struct.pack("<I", number)
