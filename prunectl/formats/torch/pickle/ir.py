"""A pickle program as what makes each of its values, so that it can be changed and written again."""

from __future__ import annotations

import mmap
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prunectl.errors import InputError
from prunectl.formats.torch.pickle import opcodes
from prunectl.formats.torch.pickle.opcodes import OpcodeReader
from prunectl.formats.torch.pickle.vm import STACK_HANDLERS, STOP, LimitExceededError, OpcodeHandler, PickleMachine, run

Bytes = bytes | memoryview

MARK = b"("
BUILD_FROM_MARK = frozenset({ord("t"), ord("l"), ord("d"), ord("i"), ord("o"), 0x91})
"""Opcodes that make a value of all that stands after a mark."""
EMPTY = frozenset({ord(")"), ord("]"), ord("}"), 0x8F})
"""Opcodes that make an empty container."""
MUTATE_FROM_MARK = frozenset({ord("e"), ord("u"), 0x90})
BUILD_OPERANDS = {0x85: 1, 0x86: 2, 0x87: 3, ord("R"): 2, 0x81: 2, 0x92: 3, 0x93: 2, ord("Q"): 1}
"""Opcodes that make a value of a fixed number of others."""
MUTATE_OPERANDS = {ord("a"): 1, ord("s"): 2, ord("b"): 1}


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
    mutations: list[Mutation] = field(default_factory=list)

    @property
    def code(self) -> int:
        """The opcode that makes the value."""
        return self.raw[0]

    @property
    def is_atom(self) -> bool:
        """Whether it is a number, a text, bytes, None or the name of a class."""
        return not self.parts and self.code not in EMPTY and self.code not in BUILD_FROM_MARK

    def children(self) -> Iterator[IRNode]:
        """Yield every value that this one is made of or filled with."""
        yield from self.parts
        for mutation in self.mutations:
            yield from mutation.parts


@dataclass(slots=True)
class PickleIR:
    """A whole program."""

    root: IRNode
    protocol: bytes
    """The instruction that says the protocol; nothing in the oldest programs."""
    end: int
    """Where the bytes after the program begin."""


def reachable(root: IRNode) -> dict[int, IRNode]:
    """Every value that takes part in one, by identity, in the order in which they are met."""
    nodes = {id(root): root}
    todo = [root.children()]
    while todo:
        node = next(todo[-1], None)
        if node is None:
            todo.pop()
        elif id(node) not in nodes:
            nodes[id(node)] = node
            todo.append(node.children())
    return nodes


MAX_COPIED_BYTES = 4096
"""A longer instruction, such as that of a NumPy array, is left where it lies."""
_PROTO = 0x80


def parse_ir(data: bytes | mmap.mmap, path: Path, *, start: int = 0, end: int | None = None) -> PickleIR:
    """Record the program that begins at an offset."""
    recorder = _Recorder(OpcodeReader(data, start, len(data) if end is None else end))
    try:
        root = run(recorder, _HANDLERS)
    except (ValueError, IndexError, KeyError, TypeError, LimitExceededError) as error:
        raise InputError(f"{path} is truncated or damaged: its pickle cannot be interpreted") from error
    return PickleIR(root, recorder.protocol, recorder.reader.offset)


class _Recorder(PickleMachine[IRNode]):
    """A machine whose values are the instructions that make them."""

    def __init__(self, reader: OpcodeReader) -> None:
        super().__init__(reader)
        self.view = memoryview(reader.data)
        self.protocol = b""

    def build(self, begin: int, parts: Sequence[IRNode] = ()) -> None:
        """Push a node made by the instruction that began at an offset and ends here."""
        reader = self.reader
        if reader.offset > reader.end:
            raise ValueError("it ends early")
        raw = self.view[begin : reader.offset]
        self.stack.append(IRNode(bytes(raw) if len(raw) <= MAX_COPIED_BYTES else raw, list(parts)))

    def mutate(self, code: int, parts: list[IRNode]) -> None:
        """Record what is done to the value on top."""
        if parts:
            self.stack[-1].mutations.append(Mutation(code, parts))


def _on_protocol(recorder: _Recorder, code: int) -> None:
    begin = recorder.reader.offset - 1
    recorder.reader.skip(opcodes.SKIPPED[code])
    if not recorder.protocol:
        recorder.protocol = bytes(recorder.view[begin : recorder.reader.offset])


def _on_number(recorder: _Recorder, code: int) -> None:
    begin = recorder.reader.offset - 1
    recorder.reader.number(_NUMBERS[code])
    recorder.build(begin)


def _on_run(recorder: _Recorder, code: int) -> None:
    begin = recorder.reader.offset - 1
    length = recorder.reader.number(_LENGTHS[code])
    if length < 0:
        raise ValueError("a length in it is negative")
    recorder.reader.skip(length)
    recorder.build(begin)


def _on_lines(recorder: _Recorder, code: int) -> None:
    begin = recorder.reader.offset - 1
    parts = recorder.since_mark() if code in BUILD_FROM_MARK else ()
    for _ in range(_LINES[code]):
        recorder.reader.line()
    recorder.build(begin, parts)


_NUMBERS = {**opcodes.NUMBERS, **opcodes.EXTENSIONS}
_LENGTHS = {**opcodes.TEXTS, **opcodes.STRINGS, **opcodes.RUNS, **opcodes.LONG_NUMBERS}
_LINES = {**dict.fromkeys([*opcodes.LINES, ord("P")], 1), ord("c"): 2, ord("i"): 2}
"""How many lines follow an opcode."""
_HANDLERS: Mapping[int, OpcodeHandler[_Recorder]] = {
    **STACK_HANDLERS,
    _PROTO: _on_protocol,
    **dict.fromkeys([*opcodes.CONSTANTS, *EMPTY], lambda recorder, _code: recorder.build(recorder.reader.offset - 1)),
    **dict.fromkeys(_NUMBERS, _on_number),
    **dict.fromkeys(_LENGTHS, _on_run),
    **dict.fromkeys(
        BUILD_FROM_MARK, lambda recorder, _: recorder.build(recorder.reader.offset - 1, recorder.since_mark())
    ),
    **dict.fromkeys(_LINES, _on_lines),
    **dict.fromkeys(
        BUILD_OPERANDS,
        lambda recorder, code: recorder.build(recorder.reader.offset - 1, recorder.pop(BUILD_OPERANDS[code])),
    ),
    **dict.fromkeys(MUTATE_FROM_MARK, lambda recorder, code: recorder.mutate(code, recorder.since_mark())),
    **dict.fromkeys(MUTATE_OPERANDS, lambda recorder, code: recorder.mutate(code, recorder.pop(MUTATE_OPERANDS[code]))),
}


_POP, _POP_MARK = b"0", b"1"
_EMPTY_TUPLE = b")"
"""The empty tuple, of which there is one."""
_MAX_INLINE_BYTES = 3
"""What is no longer than a look into the memo is written again instead."""


def emit_pickle(program: PickleIR) -> Iterator[Bytes]:
    """Yield the bytes of a program that makes what the recipe says."""
    yield program.protocol
    yield from _Emitter(program.root).run(program.root)
    yield bytes([STOP])


def emitted(node: IRNode) -> bytes:
    """A program that makes one value."""
    return b"".join(emit_pickle(PickleIR(node, b"", 0)))


class _Emitter:
    """What was written so far; a stack of what is still to do stands in for recursion, which has no such depth."""

    def __init__(self, root: IRNode) -> None:
        self.uses = Counter([id(root), *(id(part) for node in reachable(root).values() for part in node.children())])
        self.memo: dict[int, int] = {}
        self.todo: list[IRNode | Mutation | Bytes | tuple[IRNode]] = []

    def run(self, root: IRNode) -> Iterator[Bytes]:
        """Yield the instructions that leave a value on the stack."""
        self.todo.append(root)
        while self.todo:
            task = self.todo.pop()
            if isinstance(task, IRNode):
                yield from self._begin(task)
            elif isinstance(task, Mutation):
                is_marked = task.code in MUTATE_FROM_MARK
                self.todo += [bytes([task.code]), *reversed(task.parts)]
                yield MARK if is_marked else b""
            elif isinstance(task, tuple):
                yield from self._make(task[0])
            else:
                yield task

    def _begin(self, node: IRNode) -> Iterator[Bytes]:
        if id(node) in self.memo:
            yield _numbered(b"h", b"j", self.memo[id(node)])
            return
        self.todo += [(node,), *reversed(node.parts)]
        if node.code in BUILD_FROM_MARK:
            yield MARK

    def _make(self, node: IRNode) -> Iterator[Bytes]:
        if id(node) in self.memo:
            # A value inside itself: it was made while its own parts were.
            yield _POP_MARK if node.code in BUILD_FROM_MARK else _POP * len(node.parts)
            yield _numbered(b"h", b"j", self.memo[id(node)])
            return
        yield node.raw
        is_short = (node.is_atom or node.raw == _EMPTY_TUPLE) and len(node.raw) <= _MAX_INLINE_BYTES
        if node.mutations or (self.uses[id(node)] > 1 and not is_short):
            self.memo[id(node)] = len(self.memo)
            yield _numbered(b"q", b"r", self.memo[id(node)])
        self.todo += reversed(node.mutations)


def _numbered(short: bytes, long: bytes, number: int) -> bytes:
    return short + bytes([number]) if number < 256 else long + struct.pack("<I", number)
