"""Records how a pickle program makes its values, without making them."""

from __future__ import annotations

import mmap
from pathlib import Path

from prunectl.errors import InputError
from prunectl.formats.torch import opcodes, recipe
from prunectl.formats.torch.opcodes import Reader
from prunectl.formats.torch.program import MAX_STEPS, STOP
from prunectl.formats.torch.recipe import Deed, Node, Recipe

MAX_COPIED_BYTES = 4096
"""A longer instruction, such as that of a NumPy array, is left where it lies."""
_PROTO = 0x80
_LINES = {*opcodes.LINES, ord("P")}


def record(data: bytes | mmap.mmap, path: Path, *, start: int = 0, end: int | None = None) -> Recipe:
    """Record the program that begins at a byte of some data."""
    recorder = _Recorder(data, start, len(data) if end is None else end)
    try:
        return recorder.run()
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise InputError(f"{path} is truncated or damaged: its pickle cannot be followed") from error


class _Recorder:
    """The stack, the marks and the memo of pickle, full of recipes."""

    def __init__(self, data: bytes | mmap.mmap, start: int, end: int) -> None:
        self.reader = Reader(data, start, end)
        self.view = memoryview(data)
        self.stack: list[Node] = []
        self.marks: list[int] = []
        self.memo: dict[int, Node] = {}
        self.protocol = b""

    def run(self) -> Recipe:
        """Follow the program to its end."""
        for _ in range(MAX_STEPS):
            begin = self.reader.at
            if begin >= self.reader.end:
                raise ValueError("it ends early")
            code = self.view[begin]
            self.reader.skip(1)
            if code == STOP:
                return Recipe(self.stack.pop(), self.protocol, self.reader.at)
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
        if code in recipe.DEED_FROM_MARK:
            parts = self._since_mark()
        elif code in recipe.DEED_TAKES:
            parts = self._last(recipe.DEED_TAKES[code])
        else:
            return False
        if parts:
            self.stack[-1].deeds.append(Deed(code, parts))
        return True

    def _makes(self, code: int, begin: int) -> None:
        parts: list[Node] = []
        if code in recipe.FROM_MARK:
            parts = self._since_mark()
            if code == ord("i"):
                self._lines(2)
        elif code in recipe.TAKES:
            parts = self._last(recipe.TAKES[code])
        else:
            self._skip_operand(code)
        raw = self.view[begin : self.reader.at]
        if self.reader.at > self.reader.end:
            raise ValueError("it ends early")
        self.stack.append(Node(bytes(raw) if len(raw) <= MAX_COPIED_BYTES else raw, parts))

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
        elif code not in opcodes.CONSTANTS and code not in recipe.EMPTY:
            raise KeyError(code)

    def _lines(self, count: int) -> None:
        for _ in range(count):
            self.reader.line()

    def _last(self, count: int) -> list[Node]:
        if count > len(self.stack):
            raise IndexError
        found = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return found

    def _since_mark(self) -> list[Node]:
        mark = self.marks.pop()
        found = self.stack[mark:]
        del self.stack[mark:]
        return found
