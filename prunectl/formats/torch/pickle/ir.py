"""An intermediate representation (IR) of a pickle: a graph of the instructions behind its values, to edit and emit."""

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
"""Opcodes that make a value of everything on the stack above the last mark."""
EMPTY = frozenset({ord(")"), ord("]"), ord("}"), 0x8F})
"""Opcodes that make an empty container."""
MUTATE_FROM_MARK = frozenset({ord("e"), ord("u"), 0x90})
BUILD_OPERANDS = {0x85: 1, 0x86: 2, 0x87: 3, ord("R"): 2, 0x81: 2, 0x92: 3, 0x93: 2, ord("Q"): 1}
"""Opcodes that make a value of a fixed number of operands, and that number."""
MUTATE_OPERANDS = {ord("a"): 1, ord("s"): 2, ord("b"): 1}


@dataclass(slots=True, eq=False)
class Mutation:
    """An opcode that fills a value after it was made: with items, entries or a state."""

    code: int
    parts: list[IRNode]


@dataclass(slots=True, eq=False)
class IRNode:
    """A value: the instruction that makes it, its operands, and the mutations that fill it."""

    raw: Bytes
    """The bytes of the instruction: its opcode and inline arguments."""
    parts: list[IRNode] = field(default_factory=list)
    mutations: list[Mutation] = field(default_factory=list)

    @property
    def code(self) -> int:
        """The opcode that makes the value."""
        return self.raw[0]

    @property
    def is_atom(self) -> bool:
        """Whether it has no operands and is no container: a number, a string, bytes, None or the name of a class."""
        return not self.parts and self.code not in EMPTY and self.code not in BUILD_FROM_MARK

    def children(self) -> Iterator[IRNode]:
        """Yield the operands and the operands of the mutations."""
        yield from self.parts
        for mutation in self.mutations:
            yield from mutation.parts


@dataclass(slots=True)
class PickleIR:
    """A whole pickle."""

    root: IRNode
    protocol: bytes
    """The PROTO instruction; empty in protocols 0 and 1."""
    end: int
    """Offset of the first byte after the pickle."""


def reachable(root: IRNode) -> dict[int, IRNode]:
    """The root and every node below it, by `id`, in depth-first order."""
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
"""A longer instruction, such as the bytes of a NumPy array, is not copied but viewed in place."""
_PROTO = 0x80


def parse_ir(data: bytes | mmap.mmap, path: Path, *, start: int = 0, end: int | None = None) -> PickleIR:
    """Parse the pickle that begins at an offset."""
    recorder = _Recorder(OpcodeReader(data, start, len(data) if end is None else end))
    try:
        root = run(recorder, _HANDLERS)
    except (ValueError, IndexError, KeyError, TypeError, LimitExceededError) as error:
        raise InputError(f"{path} is truncated or damaged: its pickle cannot be interpreted") from error
    return PickleIR(root, recorder.protocol, recorder.reader.offset)


class _Recorder(PickleMachine[IRNode]):
    """A pickle machine whose values are IR nodes."""

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
        """Record a mutation of the value on top of the stack."""
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


def _on_bytes(recorder: _Recorder, code: int) -> None:
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
_LENGTHS = {**opcodes.TEXTS, **opcodes.STRINGS, **opcodes.BYTE_STRINGS, **opcodes.LONG_NUMBERS}
_LINES = {**dict.fromkeys([*opcodes.LINES, ord("P")], 1), ord("c"): 2, ord("i"): 2}
"""How many lines follow an opcode."""
_HANDLERS: Mapping[int, OpcodeHandler[_Recorder]] = {
    **STACK_HANDLERS,
    _PROTO: _on_protocol,
    **dict.fromkeys([*opcodes.CONSTANTS, *EMPTY], lambda recorder, _code: recorder.build(recorder.reader.offset - 1)),
    **dict.fromkeys(_NUMBERS, _on_number),
    **dict.fromkeys(_LENGTHS, _on_bytes),
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
"""The empty tuple, which Python keeps only once: emitting it again makes no second object."""
_MAX_INLINE_BYTES = 3
"""A shared atom of at most this length is emitted again rather than kept in the memo."""


def emit_pickle(program: PickleIR) -> Iterator[Bytes]:
    """Yield the bytes of a pickle from its IR."""
    yield program.protocol
    yield from _Emitter(program.root).run(program.root)
    yield bytes([STOP])


def emitted(node: IRNode) -> bytes:
    """The bytes of a pickle that makes the value of one node."""
    return b"".join(emit_pickle(PickleIR(node, b"", 0)))


class _Emitter:
    """Emits nodes depth-first, with a stack of tasks, since nodes may nest deeper than Python can recurse."""

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
            # A value that contains itself: it was emitted along with its own operands.
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
