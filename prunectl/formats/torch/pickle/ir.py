"""A pickle program as what makes each of its values, so that it can be changed and written again."""

from __future__ import annotations

import mmap
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from prunectl.errors import InputError
from prunectl.formats.torch.pickle import opcodes
from prunectl.formats.torch.pickle.opcodes import OpcodeReader
from prunectl.formats.torch.pickle.vm import MAX_STEPS, STOP

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
class Mutation:
    """Something that is done to a value once it is made: items, entries, a state."""

    code: int
    parts: list[IRNode]


@dataclass(slots=True, eq=False)
class IRNode:
    """A value, by the instruction that makes it and the values that this takes."""

    raw: Bytes
    """The instruction as it stands in the program."""
    parts: list[IRNode] = field(default_factory=list)
    deeds: list[Mutation] = field(default_factory=list)

    @property
    def code(self) -> int:
        """The opcode that makes the value."""
        return self.raw[0]

    @property
    def is_atom(self) -> bool:
        """Whether it is a number, a text, bytes, None or the name of a class."""
        return not self.parts and self.code not in EMPTY and self.code not in FROM_MARK

    def below(self) -> Iterator[IRNode]:
        """Yield every value that this one is made of or filled with."""
        yield from self.parts
        for deed in self.deeds:
            yield from deed.parts


@dataclass(slots=True)
class PickleIR:
    """A whole program."""

    root: IRNode
    protocol: bytes
    """The instruction that says the protocol; nothing in the oldest programs."""
    end: int
    """Where the bytes after the program begin."""


def reachable(root: IRNode) -> dict[int, IRNode]:
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


MAX_COPIED_BYTES = 4096
"""A longer instruction, such as that of a NumPy array, is left where it lies."""
_PROTO = 0x80
_LINES = {*opcodes.LINES, ord("P")}


def parse_ir(data: bytes | mmap.mmap, path: Path, *, start: int = 0, end: int | None = None) -> PickleIR:
    """Record the program that begins at a byte of some data."""
    recorder = _Recorder(data, start, len(data) if end is None else end)
    try:
        return recorder.run()
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise InputError(f"{path} is truncated or damaged: its pickle cannot be followed") from error


class _Recorder:
    """The stack, the marks and the memo of pickle, full of recipes."""

    def __init__(self, data: bytes | mmap.mmap, start: int, end: int) -> None:
        self.reader = OpcodeReader(data, start, end)
        self.view = memoryview(data)
        self.stack: list[IRNode] = []
        self.marks: list[int] = []
        self.memo: dict[int, IRNode] = {}
        self.protocol = b""

    def run(self) -> PickleIR:
        """Follow the program to its end."""
        for _ in range(MAX_STEPS):
            begin = self.reader.at
            if begin >= self.reader.end:
                raise ValueError("it ends early")
            code = self.view[begin]
            self.reader.skip(1)
            if code == STOP:
                return PickleIR(self.stack.pop(), self.protocol, self.reader.at)
            if not (self._remembers(code) or self._shifts(code, begin) or self._does(code)):
                self._makes(code, begin)
        raise ValueError("it has more steps than any model needs")

    def _remembers(self, code: int) -> bool:
        number = self.reader.number
        if code in opcodes.PUTS or code == ord("p"):
            place = number(opcodes.PUTS[code]) if code in opcodes.PUTS else int(self.reader.line())
            self.memo[place] = self.stack[-1]
        elif code == 0x94:
            self.memo[len(self.memo)] = self.stack[-1]
        elif code in opcodes.GETS or code == ord("g"):
            place = number(opcodes.GETS[code]) if code in opcodes.GETS else int(self.reader.line())
            self.stack.append(self.memo[place])
        else:
            return False
        return True

    def _shifts(self, code: int, begin: int) -> bool:
        if code in opcodes.SKIPPED:
            self.reader.skip(opcodes.SKIPPED[code])
            if code == _PROTO and not self.protocol:
                self.protocol = bytes(self.view[begin : self.reader.at])
        elif code == ord("("):
            self.marks.append(len(self.stack))
        elif code == ord("1"):
            self._since_mark()
        elif code == ord("2"):
            self.stack.append(self.stack[-1])
        elif code == ord("0"):
            if self.marks and self.marks[-1] == len(self.stack):
                self.marks.pop()
            else:
                self.stack.pop()
        else:
            return False
        return True

    def _does(self, code: int) -> bool:
        if code in DEED_FROM_MARK:
            parts = self._since_mark()
        elif code in DEED_TAKES:
            parts = self._last(DEED_TAKES[code])
        else:
            return False
        if parts:
            self.stack[-1].deeds.append(Mutation(code, parts))
        return True

    def _makes(self, code: int, begin: int) -> None:
        parts: list[IRNode] = []
        if code in FROM_MARK:
            parts = self._since_mark()
            if code == ord("i"):
                self._lines(2)
        elif code in TAKES:
            parts = self._last(TAKES[code])
        else:
            self._skip_operand(code)
        raw = self.view[begin : self.reader.at]
        if self.reader.at > self.reader.end:
            raise ValueError("it ends early")
        self.stack.append(IRNode(bytes(raw) if len(raw) <= MAX_COPIED_BYTES else raw, parts))

    def _skip_operand(self, code: int) -> None:
        reader = self.reader
        for lengths in (opcodes.TEXTS, opcodes.STRINGS, opcodes.RUNS, opcodes.LONG_NUMBERS):
            if code in lengths:
                length = reader.number(lengths[code])
                if length < 0:
                    raise ValueError("a length in it is negative")
                reader.skip(length)
                return
        if code in opcodes.NUMBERS:
            reader.number(opcodes.NUMBERS[code])
        elif code in opcodes.EXTENSIONS:
            reader.number(opcodes.EXTENSIONS[code])
        elif code in _LINES or code == ord("c"):
            self._lines(2 if code == ord("c") else 1)
        elif code not in opcodes.CONSTANTS and code not in EMPTY:
            raise KeyError(code)

    def _lines(self, count: int) -> None:
        for _ in range(count):
            self.reader.line()

    def _last(self, count: int) -> list[IRNode]:
        if count > len(self.stack):
            raise IndexError
        found = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return found

    def _since_mark(self) -> list[IRNode]:
        mark = self.marks.pop()
        found = self.stack[mark:]
        del self.stack[mark:]
        return found


_POP, _POP_MARK = b"0", b"1"
_NOTHING = b")"
"""The empty tuple, of which there is one."""
_MAX_INLINE_BYTES = 3
"""What is no longer than a look into the memo is written again instead."""


def emit_pickle(program: PickleIR) -> Iterator[Bytes]:
    """Yield the bytes of a program that makes what the recipe says."""
    yield program.protocol
    yield from _Emitter(program.root).run(program.root)
    yield bytes([STOP])


def emitted(node: IRNode) -> bytes:
    """Return a program that makes one value."""
    return b"".join(emit_pickle(PickleIR(node, b"", 0)))


class _Emitter:
    """What was written so far; a stack of what is still to do stands in for recursion, which has no such depth."""

    def __init__(self, root: IRNode) -> None:
        self.uses = Counter([id(root), *(id(part) for node in reachable(root).values() for part in node.below())])
        self.memo: dict[int, int] = {}
        self.todo: list[IRNode | Mutation | Bytes | tuple[IRNode]] = []

    def run(self, root: IRNode) -> Iterator[Bytes]:
        """Yield the instructions that leave a value on the stack."""
        self.todo.append(root)
        while self.todo:
            step = self.todo.pop()
            if isinstance(step, IRNode):
                yield from self._begin(step)
            elif isinstance(step, Mutation):
                is_marked = step.code in DEED_FROM_MARK
                self.todo += [bytes([step.code]), *reversed(step.parts)]
                yield MARK if is_marked else b""
            elif isinstance(step, tuple):
                yield from self._make(step[0])
            else:
                yield step

    def _begin(self, node: IRNode) -> Iterator[Bytes]:
        if id(node) in self.memo:
            yield _numbered(b"h", b"j", self.memo[id(node)])
            return
        self.todo += [(node,), *reversed(node.parts)]
        if node.code in FROM_MARK:
            yield MARK

    def _make(self, node: IRNode) -> Iterator[Bytes]:
        if id(node) in self.memo:
            # A value inside itself: it was made while its own parts were.
            yield _POP_MARK if node.code in FROM_MARK else _POP * len(node.parts)
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
