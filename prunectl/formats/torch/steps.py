"""What each opcode of pickle does to the machine: steps of bounded cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from prunectl.formats.torch import opcodes
from prunectl.formats.torch.machine import Machine
from prunectl.formats.torch.values import Made, Pairs

Step = Callable[[Machine, int], None]


def _add(machine: Machine, items: list[Any]) -> None:
    target: Any = machine.stack[-1]
    if isinstance(target, Made):
        target.items = target.items or []
        target = target.items
    if not isinstance(target, list):
        raise TypeError
    target.extend(items)


def _set(machine: Machine, items: list[Any]) -> None:
    target: Any = machine.stack[-1]
    if isinstance(target, Made):
        target.pairs = target.pairs or Pairs()
        target = target.pairs
    if not isinstance(target, Pairs):
        raise TypeError
    target.items.extend(zip(items[::2], items[1::2], strict=True))


def _build(machine: Machine, _code: int) -> None:
    state = machine.stack.pop()
    target = machine.stack[-1]
    if isinstance(target, Made):
        target.state = state


def _tuple(machine: Machine, code: int) -> None:
    size = opcodes.TUPLES[code]
    stack = machine.stack
    if size > len(stack):
        raise IndexError
    found = tuple(stack[len(stack) - size :])
    del stack[len(stack) - size :]
    stack.append(found)


def _call(verb: str) -> Step:
    def step(machine: Machine, _code: int) -> None:
        args = machine.stack.pop()
        machine.do(verb, machine.stack.pop(), args)

    return step


def _new_with_keywords(machine: Machine, _code: int) -> None:
    machine.stack.pop()
    args = machine.stack.pop()
    machine.do("class", machine.stack.pop(), args)


def _make_instance(machine: Machine, _code: int) -> None:
    found = machine.since_mark()
    machine.do("class", found[0], tuple(found[1:]))


def _make_named_instance(machine: Machine, _code: int) -> None:
    args = tuple(machine.since_mark())
    _name_by_lines(machine, _code)
    machine.do("class", machine.stack.pop(), args)


def _name_by_lines(machine: Machine, _code: int) -> None:
    module = machine.reader.line().decode("utf-8", "backslashreplace")
    machine.name(module, machine.reader.line().decode("utf-8", "backslashreplace"))


def _name_by_stack(machine: Machine, _code: int) -> None:
    name = machine.stack.pop()
    machine.name(machine.stack.pop(), name)


def _name_by_number(machine: Machine, code: int) -> None:
    machine.name("copyreg", f"extension {machine.reader.number(opcodes.EXTENSIONS[code])}")


def _tuple_since_mark(machine: Machine, _code: int) -> None:
    found = tuple(machine.since_mark())
    machine.stack.append(found)


def _list_since_mark(machine: Machine, _code: int) -> None:
    found = machine.since_mark()
    machine.stack.append(found)


def _pairs_since_mark(machine: Machine, _code: int) -> None:
    found = machine.since_mark()
    machine.keep(Pairs(list(zip(found[::2], found[1::2], strict=True))))


def _pop(machine: Machine, _code: int) -> None:
    if machine.marks and machine.marks[-1] == len(machine.stack):
        machine.marks.pop()
    else:
        machine.stack.pop()


def _append(machine: Machine, _code: int) -> None:
    item = machine.stack.pop()
    _add(machine, [item])


def _set_one(machine: Machine, _code: int) -> None:
    value = machine.stack.pop()
    key = machine.stack.pop()
    _set(machine, [key, value])


def _put(machine: Machine, code: int) -> None:
    machine.memo[machine.reader.number(opcodes.PUTS[code])] = machine.stack[-1]


def _get(machine: Machine, code: int) -> None:
    machine.stack.append(machine.memo[machine.reader.number(opcodes.GETS[code])])


def _put_by_line(machine: Machine, _code: int) -> None:
    machine.memo[int(machine.reader.line())] = machine.stack[-1]


def _get_by_line(machine: Machine, _code: int) -> None:
    machine.stack.append(machine.memo[int(machine.reader.line())])


def _memoize(machine: Machine, _code: int) -> None:
    machine.memo[len(machine.memo)] = machine.stack[-1]


def _number(machine: Machine, code: int) -> None:
    machine.stack.append(machine.reader.number(opcodes.NUMBERS[code]))


def _text(machine: Machine, code: int) -> None:
    machine.stack.append(machine.reader.text(machine.reader.number(opcodes.TEXTS[code])))


def _string(machine: Machine, code: int) -> None:
    machine.stack.append(machine.reader.string(machine.reader.number(opcodes.STRINGS[code])))


def _bytes(machine: Machine, code: int) -> None:
    machine.stack.append(machine.reader.raw(machine.reader.number(opcodes.RUNS[code])))


def _long(machine: Machine, code: int) -> None:
    machine.stack.append(machine.reader.long(machine.reader.number(opcodes.LONG_NUMBERS[code])))


def _line(machine: Machine, code: int) -> None:
    machine.stack.append(machine.reader.line_of(opcodes.LINES[code]))


def _constant(machine: Machine, code: int) -> None:
    machine.stack.append(opcodes.CONSTANTS[code])


STEPS: Mapping[int, Step] = {
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
    ord("}"): lambda machine, _: machine.keep(Pairs()),
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
