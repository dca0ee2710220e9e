"""A pickle virtual machine that imports and calls nothing.

Every opcode takes bounded time, and every call becomes an `OpaqueCall`.
The stack, the marks and the memo are shared by two interpreters: `PickleVM` here makes the values of a program,
and `ir.py` records the instructions that make them.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from prunectl.errors import InputError
from prunectl.formats.budgets import (
    MAX_PICKLE_COPIES,
    MAX_PICKLE_NAME_CHARACTERS,
    MAX_PICKLE_NAMES,
    MAX_PICKLE_OBJECTS,
    MAX_PICKLE_STEPS,
    MAX_TIED,
)
from prunectl.formats.torch.pickle import allowlist, opcodes
from prunectl.formats.torch.pickle.opcodes import (
    Global,
    OpaqueCall,
    OpcodeReader,
    Persistent,
    PickleDict,
    describe_value,
)

_REBUILD_TENSOR = "torch._utils._rebuild_tensor"
STOP = ord(".")


@dataclass(frozen=True, slots=True, eq=False)
class PickleProgram:
    """The result of interpreting a pickle."""

    value: Any
    end: int
    """Offset of the first byte after the program."""
    storages: tuple[Any, ...]
    """The persistent ids of the storages that the container has to provide."""
    foreign_calls: tuple[str, ...]
    """Functions and classes beyond the allow-list that loading would use, as phrases such as `calls os.system`."""
    steps: int
    """Number of opcodes executed and elements copied, together."""


def interpret(
    data: bytes | mmap.mmap, path: Path, subject: str, *, start: int = 0, end: int | None = None, scale: int = 1
) -> PickleProgram:
    """Interpret the pickle program that begins at ``start``; error messages call it ``subject``.

    ``scale`` multiplies the limits on steps and objects, for a program that describes many big files.
    """
    vm = PickleVM(OpcodeReader(data, start, len(data) if end is None else end), scale)
    try:
        value = run(vm, OPCODE_HANDLERS, scale * MAX_PICKLE_STEPS)
    except (ValueError, IndexError, KeyError, TypeError) as error:
        reason = f": {error}" if isinstance(error, ValueError) else ""
        raise InputError(
            f"{path} is truncated or damaged: {subject} is not a pickle that can be interpreted{reason[:80]}"
        ) from error
    except LimitExceededError as error:
        raise InputError(
            f"{path} is refused: {subject} is a pickle of more than {scale * MAX_PICKLE_STEPS} steps"
        ) from error
    return PickleProgram(value, vm.reader.offset, tuple(vm.storages), vm.foreign_calls(), vm.steps + vm.copies)


class LimitExceededError(Exception):
    """The program takes more steps than the limit."""


Value = TypeVar("Value")


class PickleMachine(Generic[Value]):
    """The stack, the marks and the memo of a pickle machine, for values of any type."""

    def __init__(self, reader: OpcodeReader) -> None:
        self.reader = reader
        self.stack: list[Value] = []
        self.marks: list[int] = []
        self.memo: dict[int, Value] = {}
        self.steps = 0

    def since_mark(self) -> list[Value]:
        """Pop the last mark and the values pushed since."""
        return self.pop_from(self.marks.pop())

    def pop(self, count: int) -> list[Value]:
        """Pop the topmost values, in the order in which they were pushed."""
        if count > len(self.stack):
            raise IndexError
        return self.pop_from(len(self.stack) - count)

    def pop_from(self, begin: int) -> list[Value]:
        """Pop the values from an index on."""
        values = self.stack[begin:]
        del self.stack[begin:]
        return values


Machine = TypeVar("Machine", bound=PickleMachine[Any])
OpcodeHandler = Callable[[Machine, int], None]


def run(
    machine: PickleMachine[Value],
    handlers: Mapping[int, Callable[[Any, int], None]],
    most_steps: int = MAX_PICKLE_STEPS,
) -> Value:
    """Execute opcodes up to STOP, and return the value on top of the stack."""
    reader, data = machine.reader, machine.reader.data
    for step in range(most_steps):
        if reader.offset >= reader.end:
            raise ValueError("it ends early")
        code = data[reader.offset]
        reader.offset += 1
        if code == STOP:
            machine.steps = step
            return machine.stack.pop()
        handlers[code](machine, code)
    raise LimitExceededError


def _pop(machine: PickleMachine[Any], _code: int) -> None:
    if machine.marks and machine.marks[-1] == len(machine.stack):
        machine.marks.pop()
    else:
        machine.stack.pop()


def _put(machine: PickleMachine[Any], code: int) -> None:
    machine.memo[machine.reader.number(opcodes.PUTS[code])] = machine.stack[-1]


def _get(machine: PickleMachine[Any], code: int) -> None:
    machine.stack.append(machine.memo[machine.reader.number(opcodes.GETS[code])])


def _put_by_line(machine: PickleMachine[Any], _code: int) -> None:
    machine.memo[int(machine.reader.line())] = machine.stack[-1]


def _get_by_line(machine: PickleMachine[Any], _code: int) -> None:
    machine.stack.append(machine.memo[int(machine.reader.line())])


def _memoize(machine: PickleMachine[Any], _code: int) -> None:
    machine.memo[len(machine.memo)] = machine.stack[-1]


STACK_HANDLERS: Mapping[int, OpcodeHandler[PickleMachine[Any]]] = {
    **dict.fromkeys(opcodes.SKIPPED, lambda machine, code: machine.reader.skip(opcodes.SKIPPED[code])),
    **dict.fromkeys(opcodes.PUTS, _put),
    **dict.fromkeys(opcodes.GETS, _get),
    ord("p"): _put_by_line,
    ord("g"): _get_by_line,
    0x94: _memoize,
    ord("("): lambda machine, _: machine.marks.append(len(machine.stack)),
    ord("0"): _pop,
    ord("1"): lambda machine, _: machine.since_mark().clear(),
    ord("2"): lambda machine, _: machine.stack.append(machine.stack[-1]),
}
"""Opcodes that only move values between the stack, the marks and the memo."""


class PickleVM(PickleMachine[Any]):
    """A pickle machine that makes the values of a program, with an `OpaqueCall` in place of each call."""

    def __init__(self, reader: OpcodeReader, scale: int = 1) -> None:
        super().__init__(reader)
        self.most_objects = scale * MAX_PICKLE_OBJECTS
        self.storages: list[Any] = []
        self.globals: dict[Global, None] = {}
        self.foreign: dict[str, None] = {}
        self.objects = 0
        self.copies = 0
        self.views: Counter[str] = Counter()
        """How many tensors are views of each storage, by its key."""

    def foreign_calls(self) -> tuple[str, ...]:
        """Foreign functions and classes that are called or instantiated, then those that are only imported."""
        reported = {call.partition(" ")[2] for call in self.foreign}
        imports = [f"imports {describe_value(name.path)}" for name in self.globals if not allowlist.is_allowed(name)]
        return (*self.foreign, *(line for line in imports if line.partition(" ")[2] not in reported))

    def call_function(self, verb: str, function: Any, args: Any) -> None:
        """Push the result of a call, and record the call if it is not on the allow-list."""
        # Every copy of an element counts, since one list in the memo may be the argument of every call.
        self.copies += allowlist.copied(function, args)
        if self.copies > MAX_PICKLE_COPIES:
            raise ValueError("it copies more elements than prunectl allows")
        result = allowlist.result_of_call(function, args)
        called = result.function if isinstance(result, OpaqueCall) else function
        if isinstance(called, Global) and not allowlist.is_allowed(called):
            is_class = isinstance(result, OpaqueCall) and called is not function
            self.foreign[f"{'class' if is_class else verb} {describe_value(called.path)}"] = None
        if isinstance(called, Global) and called.path.startswith(_REBUILD_TENSOR):
            self.count_view(args)
        self.push_new(result)

    def count_view(self, args: Any) -> None:
        """Count a tensor as a view of its storage."""
        storage = args[0] if isinstance(args, tuple) and args else None
        fields = storage.id if isinstance(storage, Persistent) and isinstance(storage.id, tuple) else ()
        key = fields[2] if len(fields) > 2 else None  # ("storage", class, key, location, count)
        if isinstance(key, str):
            self.views[key] += 1
            if self.views[key] > MAX_TIED:
                raise ValueError("more tensors share one storage than prunectl allows")

    def push_new(self, value: Any) -> None:
        """Push a value that takes memory of its own, and count it as an object."""
        self.objects += 1
        if self.objects > self.most_objects:
            raise ValueError("it creates more objects than prunectl allows")
        self.stack.append(value)

    def push_global(self, module: Any, name: Any) -> None:
        """Push the function or class that an opcode names, without importing it."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError
        if len(module) + len(name) > MAX_PICKLE_NAME_CHARACTERS:
            raise ValueError("the name of a function in it is too long")
        function = Global(module, name)
        self.globals[function] = None
        if len(self.globals) > MAX_PICKLE_NAMES:
            raise ValueError("it names more functions than prunectl allows")
        self.stack.append(function)

    def push_persistent(self, key: Any) -> None:
        """Push the object behind a persistent id: the class itself if the id holds a class, otherwise a storage."""
        if not isinstance(key, tuple | str | int):
            raise TypeError
        if isinstance(key, tuple) and key:
            kind = key[1] if key[0] == "module" and len(key) > 1 else key[0]
            if isinstance(kind, Global):
                self.stack.append(kind)
                return
        self.storages.append(key)
        self.push_new(Persistent(key))


def _add(vm: PickleVM, items: list[Any]) -> None:
    target: Any = vm.stack[-1]
    if isinstance(target, OpaqueCall):
        target.items = target.items or []
        target = target.items
    if not isinstance(target, list):
        raise TypeError
    target.extend(items)


def _set(vm: PickleVM, items: list[Any]) -> None:
    target: Any = vm.stack[-1]
    if isinstance(target, OpaqueCall):
        target.pairs = target.pairs or PickleDict()
        target = target.pairs
    if not isinstance(target, PickleDict):
        raise TypeError
    target.items.extend(zip(items[::2], items[1::2], strict=True))


def _build(vm: PickleVM, _code: int) -> None:
    state = vm.stack.pop()
    target = vm.stack[-1]
    if isinstance(target, OpaqueCall):
        target.state = state


def _call(verb: str) -> OpcodeHandler[PickleVM]:
    def handler(vm: PickleVM, _code: int) -> None:
        args = vm.stack.pop()
        vm.call_function(verb, vm.stack.pop(), args)

    return handler


def _new_with_keywords(vm: PickleVM, _code: int) -> None:
    vm.stack.pop()
    args = vm.stack.pop()
    vm.call_function("class", vm.stack.pop(), args)


def _make_instance(vm: PickleVM, _code: int) -> None:
    values = vm.since_mark()
    vm.call_function("class", values[0], tuple(values[1:]))


def _make_named_instance(vm: PickleVM, _code: int) -> None:
    args = tuple(vm.since_mark())
    _name_by_lines(vm, _code)
    vm.call_function("class", vm.stack.pop(), args)


def _name_by_lines(vm: PickleVM, _code: int) -> None:
    module = vm.reader.line().decode("utf-8", "backslashreplace")
    vm.push_global(module, vm.reader.line().decode("utf-8", "backslashreplace"))


def _name_by_stack(vm: PickleVM, _code: int) -> None:
    name = vm.stack.pop()
    vm.push_global(vm.stack.pop(), name)


def _name_by_number(vm: PickleVM, code: int) -> None:
    vm.push_global("copyreg", f"extension {vm.reader.number(opcodes.EXTENSIONS[code])}")


def _dict_since_mark(vm: PickleVM, _code: int) -> None:
    values = vm.since_mark()
    vm.push_new(PickleDict(list(zip(values[::2], values[1::2], strict=True))))


def _append(vm: PickleVM, _code: int) -> None:
    item = vm.stack.pop()
    _add(vm, [item])


def _set_one(vm: PickleVM, _code: int) -> None:
    value = vm.stack.pop()
    key = vm.stack.pop()
    _set(vm, [key, value])


def _text(vm: PickleVM, code: int) -> None:
    vm.stack.append(vm.reader.text(vm.reader.number(opcodes.TEXTS[code])))


def _string(vm: PickleVM, code: int) -> None:
    vm.stack.append(vm.reader.string(vm.reader.number(opcodes.STRINGS[code])))


def _bytes(vm: PickleVM, code: int) -> None:
    vm.stack.append(vm.reader.raw(vm.reader.number(opcodes.BYTE_STRINGS[code])))


def _long(vm: PickleVM, code: int) -> None:
    vm.stack.append(vm.reader.long(vm.reader.number(opcodes.LONG_NUMBERS[code])))


OPCODE_HANDLERS: Mapping[int, OpcodeHandler[PickleVM]] = {
    **STACK_HANDLERS,
    **dict.fromkeys(opcodes.CONSTANTS, lambda vm, code: vm.stack.append(opcodes.CONSTANTS[code])),
    **dict.fromkeys(opcodes.NUMBERS, lambda vm, code: vm.stack.append(vm.reader.number(opcodes.NUMBERS[code]))),
    **dict.fromkeys(opcodes.TEXTS, _text),
    **dict.fromkeys(opcodes.STRINGS, _string),
    **dict.fromkeys(opcodes.BYTE_STRINGS, _bytes),
    **dict.fromkeys(opcodes.LONG_NUMBERS, _long),
    **dict.fromkeys(opcodes.LINES, lambda vm, code: vm.stack.append(vm.reader.line_of(opcodes.LINES[code]))),
    **dict.fromkeys(opcodes.TUPLES, lambda vm, code: vm.stack.append(tuple(vm.pop(opcodes.TUPLES[code])))),
    **dict.fromkeys(opcodes.EXTENSIONS, _name_by_number),
    **dict.fromkeys((ord("]"), 0x8F), lambda vm, _: vm.stack.append([])),
    ord("}"): lambda vm, _: vm.push_new(PickleDict()),
    ord("t"): lambda vm, _: vm.stack.append(tuple(vm.since_mark())),
    **dict.fromkeys((ord("l"), 0x91), lambda vm, _: vm.stack.append(vm.since_mark())),
    ord("d"): _dict_since_mark,
    ord("a"): _append,
    **dict.fromkeys((ord("e"), 0x90), lambda vm, _: _add(vm, vm.since_mark())),
    ord("s"): _set_one,
    ord("u"): lambda vm, _: _set(vm, vm.since_mark()),
    ord("c"): _name_by_lines,
    0x93: _name_by_stack,
    ord("i"): _make_named_instance,
    ord("o"): _make_instance,
    ord("R"): _call("calls"),
    0x81: _call("class"),
    0x92: _new_with_keywords,
    ord("b"): _build,
    ord("P"): lambda vm, _: vm.push_persistent(vm.reader.line().decode("latin-1")),
    ord("Q"): lambda vm, _: vm.push_persistent(vm.stack.pop()),
}
"""The opcodes for out-of-band buffers (0x97, 0x98) are left out on purpose: no file can hold such buffers."""
