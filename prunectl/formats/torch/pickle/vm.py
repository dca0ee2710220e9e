"""The stack, the marks and the memo of pickle, with nothing behind them that could run.

A pickle program, followed without importing or calling anything.

Every opcode is a step of bounded cost; what the program would have called becomes a value that says so.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunectl.errors import InputError
from prunectl.formats.budgets import MAX_PICKLE_COPIES, MAX_PICKLE_NAME_CHARACTERS, MAX_STORAGE_TENSORS
from prunectl.formats.torch.pickle import allowlist, opcodes
from prunectl.formats.torch.pickle.opcodes import (
    Global,
    OpaqueCall,
    OpcodeReader,
    Persistent,
    PickleDict,
    describe_value,
)

MAX_THINGS = 500_000
MAX_NAMES = 20_000
"""NameAllocator functions and classes that a program may name."""
_TENSORS = "torch._utils._rebuild_tensor"


class PickleVM:
    """The stack, the marks and the memo of pickle."""

    def __init__(self, reader: OpcodeReader) -> None:
        self.reader = reader
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: list[Any] = []
        self.named: dict[Global, None] = {}
        self.deeds: dict[str, None] = {}
        self.things = 0
        self.copies = 0
        self.views: Counter[str] = Counter()
        """How many tensors see each storage."""

    def strangers(self) -> tuple[str, ...]:
        """Say what is called or made, then what is only named."""
        done = {deed.partition(" ")[2] for deed in self.deeds}
        imports = [f"imports {describe_value(name.path)}" for name in self.named if not allowlist.is_allowed(name)]
        return (*self.deeds, *(line for line in imports if line.partition(" ")[2] not in done))

    def do(self, verb: str, function: Any, args: Any) -> None:
        """Push what a call would return, and remember the deed if it is a strange one."""
        # What is copied counts, not what is named: one list of the memo may be the argument of every call.
        self.copies += allowlist.copied(function, args)
        if self.copies > MAX_PICKLE_COPIES:
            raise ValueError("it copies more elements than any model needs")
        made = allowlist.call_allowed(function, args)
        called = made.function if isinstance(made, OpaqueCall) else function
        if isinstance(called, Global) and not allowlist.is_allowed(called):
            is_class = isinstance(made, OpaqueCall) and called is not function
            self.deeds[f"{'class' if is_class else verb} {describe_value(called.path)}"] = None
        if isinstance(called, Global) and called.path.startswith(_TENSORS):
            self.count_view(args)
        self.keep(made)

    def count_view(self, args: Any) -> None:
        """Count a tensor to its storage."""
        place = args[0] if isinstance(args, tuple) and args else None
        names = place.id if isinstance(place, Persistent) and isinstance(place.id, tuple) else ()
        key = names[2] if len(names) > 2 else None  # ("storage", class, key, location, count)
        if isinstance(key, str):
            self.views[key] += 1
            if self.views[key] > MAX_STORAGE_TENSORS:
                raise ValueError("more tensors share one storage than in any model")

    def keep(self, thing: Any) -> None:
        """Push a thing that takes memory of its own."""
        self.things += 1
        if self.things > MAX_THINGS:
            raise ValueError("it makes more objects than any model needs")
        self.stack.append(thing)

    def name(self, module: Any, name: Any) -> None:
        """Push what an import would return."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError
        if len(module) + len(name) > MAX_PICKLE_NAME_CHARACTERS:
            raise ValueError("it names a function by more letters than any has")
        found = Global(module, name)
        self.named[found] = None
        if len(self.named) > MAX_NAMES:
            raise ValueError("it names more functions than any model needs")
        self.stack.append(found)

    def since_mark(self) -> list[Any]:
        """Pop what was pushed since the last mark."""
        mark = self.marks.pop()
        found = self.stack[mark:]
        del self.stack[mark:]
        return found

    def persist(self, key: Any) -> None:
        """Push what the container would provide: a class stands for itself, the rest for a storage."""
        if not isinstance(key, tuple | str | int):
            raise TypeError
        if isinstance(key, tuple) and key:
            known = key[1] if key[0] == "module" and len(key) > 1 else key[0]
            if isinstance(known, Global):
                self.stack.append(known)
                return
        self.storages.append(key)
        self.keep(Persistent(key))


OpcodeHandler = Callable[[PickleVM, int], None]


def _add(machine: PickleVM, items: list[Any]) -> None:
    target: Any = machine.stack[-1]
    if isinstance(target, OpaqueCall):
        target.items = target.items or []
        target = target.items
    if not isinstance(target, list):
        raise TypeError
    target.extend(items)


def _set(machine: PickleVM, items: list[Any]) -> None:
    target: Any = machine.stack[-1]
    if isinstance(target, OpaqueCall):
        target.pairs = target.pairs or PickleDict()
        target = target.pairs
    if not isinstance(target, PickleDict):
        raise TypeError
    target.items.extend(zip(items[::2], items[1::2], strict=True))


def _build(machine: PickleVM, _code: int) -> None:
    state = machine.stack.pop()
    target = machine.stack[-1]
    if isinstance(target, OpaqueCall):
        target.state = state


def _tuple(machine: PickleVM, code: int) -> None:
    size = opcodes.TUPLES[code]
    stack = machine.stack
    if size > len(stack):
        raise IndexError
    found = tuple(stack[len(stack) - size :])
    del stack[len(stack) - size :]
    stack.append(found)


def _call(verb: str) -> OpcodeHandler:
    def step(machine: PickleVM, _code: int) -> None:
        args = machine.stack.pop()
        machine.do(verb, machine.stack.pop(), args)

    return step


def _new_with_keywords(machine: PickleVM, _code: int) -> None:
    machine.stack.pop()
    args = machine.stack.pop()
    machine.do("class", machine.stack.pop(), args)


def _make_instance(machine: PickleVM, _code: int) -> None:
    found = machine.since_mark()
    machine.do("class", found[0], tuple(found[1:]))


def _make_named_instance(machine: PickleVM, _code: int) -> None:
    args = tuple(machine.since_mark())
    _name_by_lines(machine, _code)
    machine.do("class", machine.stack.pop(), args)


def _name_by_lines(machine: PickleVM, _code: int) -> None:
    module = machine.reader.line().decode("utf-8", "backslashreplace")
    machine.name(module, machine.reader.line().decode("utf-8", "backslashreplace"))


def _name_by_stack(machine: PickleVM, _code: int) -> None:
    name = machine.stack.pop()
    machine.name(machine.stack.pop(), name)


def _name_by_number(machine: PickleVM, code: int) -> None:
    machine.name("copyreg", f"extension {machine.reader.number(opcodes.EXTENSIONS[code])}")


def _tuple_since_mark(machine: PickleVM, _code: int) -> None:
    found = tuple(machine.since_mark())
    machine.stack.append(found)


def _list_since_mark(machine: PickleVM, _code: int) -> None:
    found = machine.since_mark()
    machine.stack.append(found)


def _pairs_since_mark(machine: PickleVM, _code: int) -> None:
    found = machine.since_mark()
    machine.keep(PickleDict(list(zip(found[::2], found[1::2], strict=True))))


def _pop(machine: PickleVM, _code: int) -> None:
    if machine.marks and machine.marks[-1] == len(machine.stack):
        machine.marks.pop()
    else:
        machine.stack.pop()


def _append(machine: PickleVM, _code: int) -> None:
    item = machine.stack.pop()
    _add(machine, [item])


def _set_one(machine: PickleVM, _code: int) -> None:
    value = machine.stack.pop()
    key = machine.stack.pop()
    _set(machine, [key, value])


def _put(machine: PickleVM, code: int) -> None:
    machine.memo[machine.reader.number(opcodes.PUTS[code])] = machine.stack[-1]


def _get(machine: PickleVM, code: int) -> None:
    machine.stack.append(machine.memo[machine.reader.number(opcodes.GETS[code])])


def _put_by_line(machine: PickleVM, _code: int) -> None:
    machine.memo[int(machine.reader.line())] = machine.stack[-1]


def _get_by_line(machine: PickleVM, _code: int) -> None:
    machine.stack.append(machine.memo[int(machine.reader.line())])


def _memoize(machine: PickleVM, _code: int) -> None:
    machine.memo[len(machine.memo)] = machine.stack[-1]


def _number(machine: PickleVM, code: int) -> None:
    machine.stack.append(machine.reader.number(opcodes.NUMBERS[code]))


def _text(machine: PickleVM, code: int) -> None:
    machine.stack.append(machine.reader.text(machine.reader.number(opcodes.TEXTS[code])))


def _string(machine: PickleVM, code: int) -> None:
    machine.stack.append(machine.reader.string(machine.reader.number(opcodes.STRINGS[code])))


def _bytes(machine: PickleVM, code: int) -> None:
    machine.stack.append(machine.reader.raw(machine.reader.number(opcodes.RUNS[code])))


def _long(machine: PickleVM, code: int) -> None:
    machine.stack.append(machine.reader.long(machine.reader.number(opcodes.LONG_NUMBERS[code])))


def _line(machine: PickleVM, code: int) -> None:
    machine.stack.append(machine.reader.line_of(opcodes.LINES[code]))


def _constant(machine: PickleVM, code: int) -> None:
    machine.stack.append(opcodes.CONSTANTS[code])


STEPS: Mapping[int, OpcodeHandler] = {
    **dict.fromkeys(opcodes.CONSTANTS, _constant),
    **dict.fromkeys(opcodes.NUMBERS, _number),
    **dict.fromkeys(opcodes.TEXTS, _text),
    **dict.fromkeys(opcodes.STRINGS, _string),
    **dict.fromkeys(opcodes.RUNS, _bytes),
    **dict.fromkeys(opcodes.LONG_NUMBERS, _long),
    **dict.fromkeys(opcodes.LINES, _line),
    **dict.fromkeys(opcodes.TUPLES, _tuple),
    **dict.fromkeys(opcodes.PUTS, _put),
    **dict.fromkeys(opcodes.GETS, _get),
    **dict.fromkeys(opcodes.EXTENSIONS, _name_by_number),
    **dict.fromkeys(opcodes.SKIPPED, lambda machine, code: machine.reader.skip(opcodes.SKIPPED[code])),
    ord("("): lambda machine, _: machine.marks.append(len(machine.stack)),
    ord("0"): _pop,
    ord("1"): lambda machine, _: machine.since_mark().clear(),
    ord("2"): lambda machine, _: machine.stack.append(machine.stack[-1]),
    ord("]"): lambda machine, _: machine.stack.append([]),
    ord("}"): lambda machine, _: machine.keep(PickleDict()),
    0x8F: lambda machine, _: machine.stack.append([]),
    ord("t"): _tuple_since_mark,
    ord("l"): _list_since_mark,
    0x91: _list_since_mark,
    ord("d"): _pairs_since_mark,
    ord("a"): _append,
    ord("e"): lambda machine, _: _add(machine, machine.since_mark()),
    0x90: lambda machine, _: _add(machine, machine.since_mark()),
    ord("s"): _set_one,
    ord("u"): lambda machine, _: _set(machine, machine.since_mark()),
    ord("p"): _put_by_line,
    ord("g"): _get_by_line,
    0x94: _memoize,
    ord("c"): _name_by_lines,
    0x93: _name_by_stack,
    ord("i"): _make_named_instance,
    ord("o"): _make_instance,
    ord("R"): _call("calls"),
    0x81: _call("class"),
    0x92: _new_with_keywords,
    ord("b"): _build,
    ord("P"): lambda machine, _: machine.persist(machine.reader.line().decode("latin-1")),
    ord("Q"): lambda machine, _: machine.persist(machine.stack.pop()),
}
"""Out-of-band buffers (0x97, 0x98) are missing on purpose: no file can hold them."""


MAX_STEPS = 2_000_000
"""More than any model needs: ten thousand tensors take half a million."""
STOP = ord(".")


@dataclass(frozen=True, slots=True, eq=False)
class PickleProgram:
    """What a pickle would make."""

    value: Any
    end: int
    """Where the bytes after the program begin."""
    storages: tuple[Any, ...]
    """The ids of all that the container has to provide."""
    strangers: tuple[str, ...]
    """What loading would call, make or import beyond plain data, each as a phrase."""


def interpret(
    data: bytes | mmap.mmap, path: Path, what: str, *, start: int = 0, end: int | None = None
) -> PickleProgram:
    """Follow the pickle program that begins at a byte of some data."""
    machine = PickleVM(OpcodeReader(data, start, len(data) if end is None else end))
    try:
        value = _interpret(machine)
    except (ValueError, IndexError, KeyError, TypeError) as error:
        reason = f": {error}" if isinstance(error, ValueError) else ""
        raise InputError(
            f"{path} is truncated or damaged: {what} is not a pickle that can be followed{reason[:80]}"
        ) from error
    except _LimitExceededError as error:
        raise InputError(f"{path} is refused: {what} is a pickle of more than {MAX_STEPS} steps") from error
    return PickleProgram(value, machine.reader.at, tuple(machine.storages), machine.strangers())


class _LimitExceededError(Exception):
    """The program is too long to be a model's."""


def _interpret(machine: PickleVM) -> Any:
    reader, data = machine.reader, machine.reader.data
    for _ in range(MAX_STEPS):
        if reader.at >= reader.end:
            raise ValueError("it ends early")
        code = data[reader.at]
        reader.at += 1
        if code == STOP:
            return machine.stack.pop()
        STEPS[code](machine, code)
    raise _LimitExceededError
