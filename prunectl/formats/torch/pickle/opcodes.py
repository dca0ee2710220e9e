"""The opcodes of pickle, protocols 0 to 5, and the bytes that follow them."""

from __future__ import annotations

import codecs
import mmap
import struct
import sys
from dataclasses import dataclass, field
from typing import Any

from prunectl.formats import budgets
from prunectl.formats.budgets import BROKEN_TEXT_COST, MAX_PICKLE_TEXT_BYTES

MAX_SHOWN_CHARACTERS = 120


@dataclass(frozen=True, slots=True)
class Global:
    """A function or class that the pickle names."""

    module: str
    name: str
    path: str = field(init=False, repr=False, compare=False)
    """The dotted path that Python would import; built once, since a pickle may call one function 500,000 times."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", f"{self.module}.{self.name}")


@dataclass(frozen=True, slots=True, eq=False)
class RawBytes:
    """Bytes or a long string, by their position in the pickle."""

    offset: int
    nbytes: int
    head: bytes
    """All of the bytes if they are few, otherwise empty."""


@dataclass(slots=True, eq=False)
class Persistent:
    """An object that the container provides, such as a storage, by its persistent id."""

    id: Any


@dataclass(slots=True, eq=False)
class PickleDict:
    """A dictionary as a list of entries: hashing the keys of an untrusted file could take forever."""

    items: list[tuple[Any, Any]] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """The entries whose keys are strings."""
        return {key: value for key, value in self.items if isinstance(key, str)}


@dataclass(slots=True, eq=False)
class OpaqueCall:
    """The unknown result of a call that was not made: its arguments, and the state and items set later."""

    function: Any
    args: Any
    state: Any = None
    pairs: PickleDict | None = None
    items: list[Any] | None = None

    @property
    def path(self) -> str:
        """The dotted path of the function or class; empty if the function is itself the result of a call."""
        return self.function.path if isinstance(self.function, Global) else ""

    def arg(self, index: int) -> Any:
        """One positional argument, or None."""
        return self.args[index] if isinstance(self.args, tuple) and index < len(self.args) else None


def describe_value(text: str) -> str:
    """A string of an untrusted file, made printable and short enough for one line."""
    plain = "".join(letter if letter.isprintable() else "?" for letter in text[:MAX_SHOWN_CHARACTERS])
    return plain if len(text) <= MAX_SHOWN_CHARACTERS else f"{plain}..."


CONSTANTS: dict[int, Any] = {ord("N"): None, 0x88: True, 0x89: False}
NUMBERS = {ord("J"): "<i", ord("K"): "<B", ord("M"): "<H", ord("G"): ">d"}
LONG_NUMBERS = {0x8A: "<B", 0x8B: "<i"}
LINES = {ord("I"): "int", ord("L"): "int", ord("F"): "float", ord("S"): "string", ord("V"): "text"}
TEXTS = {ord("X"): "<I", 0x8C: "<B", 0x8D: "<Q"}
STRINGS = {ord("T"): "<i", ord("U"): "<B"}
"""Strings of Python 2, which may hold text or bytes."""
BYTE_STRINGS = {ord("B"): "<I", ord("C"): "<B", 0x8E: "<Q", 0x96: "<Q"}
TUPLES = {ord(")"): 0, 0x85: 1, 0x86: 2, 0x87: 3}
PUTS = {ord("q"): "<B", ord("r"): "<I"}
GETS = {ord("h"): "<B", ord("j"): "<I"}
SKIPPED = {0x80: 1, 0x95: 8}
"""Opcodes with their argument bytes: PROTO and FRAME do not change the values that follow."""
EXTENSIONS = {0x82: "<B", 0x83: "<H", 0x84: "<i"}


_EMPTY_TEXT_BYTES = sys.getsizeof("")


@dataclass(slots=True)
class OpcodeReader:
    """A cursor over the bytes of a pickle; reading past their end raises ValueError."""

    data: bytes | mmap.mmap
    offset: int
    end: int
    text_bytes: int = 0
    """Memory that strings take so far, in bytes: of the decoded strings, not of their encoded form."""

    def count_text(self, nbytes: int) -> None:
        """Count the memory of a string against the limit."""
        self.text_bytes += nbytes
        if self.text_bytes > MAX_PICKLE_TEXT_BYTES:
            raise ValueError("it holds more text than any model")

    def skip(self, nbytes: int) -> None:
        """Skip some bytes."""
        self.offset += nbytes

    def number(self, layout: str) -> Any:
        """A number of fixed size."""
        size = struct.calcsize(layout)
        if self.offset + size > self.end:
            raise ValueError("it ends early")
        (value,) = struct.unpack_from(layout, self.data, self.offset)
        self.offset += size
        return value

    def read(self, nbytes: int) -> bytes:
        """The next bytes."""
        if nbytes < 0 or self.offset + nbytes > self.end:
            raise ValueError("it ends early")
        data = self.data[self.offset : self.offset + nbytes]
        self.offset += nbytes
        return data

    def raw(self, nbytes: int) -> RawBytes:
        """The next bytes by their position, with a copy of them only if they are few."""
        if nbytes < 0 or self.offset + nbytes > self.end:
            raise ValueError("it ends early")
        offset = self.offset
        head = b""
        if nbytes <= budgets.MAX_NAME_BYTES:
            self.count_text(nbytes)
            head = self.read(nbytes)
        self.offset = offset + nbytes
        return RawBytes(offset, nbytes, head)

    def text(self, nbytes: int) -> str | RawBytes:
        """A string; a string too long to be a name is not decoded, but returned by its position."""
        if nbytes > budgets.MAX_NAME_BYTES:
            return self.raw(nbytes)
        raw = self.read(nbytes)
        try:
            decoded = raw.decode()
        except UnicodeDecodeError:
            self.count_text(BROKEN_TEXT_COST * nbytes)
            # Printing a name with unpaired surrogates would fail.
            decoded = raw.decode("utf-8", "backslashreplace")
        self.count_text(sys.getsizeof(decoded) - _EMPTY_TEXT_BYTES)
        return decoded

    def string(self, nbytes: int) -> str | RawBytes:
        """A string of Python 2, decoded if it is short UTF-8."""
        raw = self.raw(nbytes)
        try:
            return raw.head.decode() if nbytes <= budgets.MAX_NAME_BYTES else raw
        except UnicodeDecodeError:
            return raw

    def long(self, nbytes: int) -> int:
        """An integer of variable length, within reason."""
        if nbytes > budgets.MAX_MARK_BYTES:
            raise ValueError("a number in it is absurdly long")
        return int.from_bytes(self.read(nbytes), "little", signed=True)

    def line(self) -> bytes:
        """The bytes up to the end of the line."""
        stop = self.data.find(b"\n", self.offset, min(self.end, self.offset + budgets.MAX_NAME_BYTES))
        if stop < 0:
            raise ValueError("it ends early")
        data = self.data[self.offset : stop]
        self.count_text(len(data))
        self.offset = stop + 1
        return data

    def line_of(self, kind: str) -> Any:
        """A value that protocol 0 writes as a line of text."""
        line = self.line()
        if kind == "int":
            known = {b"00": False, b"01": True}
            return known[line] if line in known else int(line.removesuffix(b"L"))
        if kind == "float":
            return float(line)
        if kind == "text":
            return line.decode("raw-unicode-escape", "replace")
        return codecs.escape_decode(line[1:-1])[0].decode("latin-1")
