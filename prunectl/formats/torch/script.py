"""Parse the code of a TorchScript file: which tensors are parameters, and how each of them is used."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from prunectl.formats import budgets
from prunectl.formats.state_dict import StateUse
from prunectl.formats.torch.tree import CONSTANTS
from prunectl.formats.torch.usage import (
    ARITHMETIC,
    NOTHING,
    RECURRENT,
    WEIGHT_ARGUMENTS,
    Flow,
    Origins,
    ValueOrigin,
    join_origins,
    pass_through,
)
from prunectl.formats.zip_read import Archive

_CLASS = re.compile(r"^class (\w+)\(Module\):$")
_PARAMETERS = re.compile(r"^  __parameters__ = \[(.*)\]$")
_NAME = re.compile(r'"([^"]*)"')


def code(archive: Archive, folder: str) -> tuple[Sequence[tuple[str, str]], bool]:
    """The code as pairs of a dotted path and a source text, and whether there is code and all of it was read."""
    modules: list[tuple[str, str]] = []
    left, is_whole = budgets.MAX_READ_CODE_BYTES, True
    for name, entry in archive.entries.items():
        if not name.startswith(f"{folder}code/") or not name.endswith(".py"):
            continue
        if entry.nbytes > left:
            is_whole = False
            continue
        left -= entry.nbytes
        module = name.removeprefix(f"{folder}code/").removesuffix(".py").replace("/", ".")
        modules.append((module, archive.read(name, entry.nbytes).decode("utf-8", "replace")))
    return modules, is_whole and bool(modules)


def parameters(modules: Sequence[tuple[str, str]]) -> Mapping[str, frozenset[str]]:
    """The parameters of each class of module, by the dotted path of the class."""
    by_class: dict[str, frozenset[str]] = {}
    for module, text in modules:
        owner = ""
        for line in text.splitlines():
            if header := _CLASS.match(line):
                owner = f"{module}.{header[1]}"
            elif owner and (match := _PARAMETERS.match(line)):
                by_class[owner] = frozenset(_NAME.findall(match[1]))
    return by_class


_TOKEN = re.compile(
    r'"(?:[^"\\]|\\.?)*(?:"|$)|\'(?:[^\'\\]|\\.?)*(?:\'|$)|\.?[A-Za-z_]\w*(?:\.\w+)*|[0-9][\w.]*|[^\s\w]'
)
"""Strings, dotted names, numbers, symbols; a string that does not end goes up to the end of its line."""
_OPEN, _CLOSE = frozenset("([{"), frozenset(")]}")
_ENDS = frozenset((",", ")", "]", "}", ":", "=", ""))
_LIBRARIES = ("torch.", "ops.")
_CASTS = frozenset({"annotate", "unchecked_cast"})
_STATEMENTS = frozenset(
    {"if", "elif", "while", "for", "else", "pass", "return", "with", "assert", "raise", "in", "not"}
)
_TRANSPOSED_INDEX = 6
_RNN_RANGE = slice(2, 4)


class _UnparsableError(Exception):
    """The code is not as PyTorch writes it."""


class _Value(NamedTuple):
    """The known facts of a value: the tensors that it comes from, the class of a module, the items of a list."""

    origins: Origins = NOTHING
    kind: str = ""
    function: str = ""
    items: tuple[_Value, ...] | None = None
    text: str = ""


_UNKNOWN = _Value()


@dataclass(slots=True)
class _Function:
    """A function or a method while it is read, with the values of its local names."""

    path: str
    names: dict[str, _Value] = field(default_factory=dict)


def uses(modules: Iterable[tuple[str, str]]) -> Mapping[tuple[str, str], StateUse] | None:
    """The uses of the attributes of each class, and of the constants; None if PyTorch wrote no such code, or too much.

    ``modules`` are pairs of a dotted path and a source text. The keys of the uses are pairs of class and attribute.
    """
    reader = _Reader()
    try:
        lines = [(path, indent, line) for path, text in modules for indent, line in _lines(text, reader)]
        reader.declare(lines)
        reader.follow(lines)
    except (_UnparsableError, IndexError):
        return None
    return {key: use for key, use in reader.flow.resolve().items() if isinstance(key, tuple) and len(key) == 2}


def _lines(text: str, reader: _Reader) -> Iterator[tuple[int, list[str]]]:
    """Yield logical lines as tokens, with their indents; a line goes on while a bracket is open."""
    depth, indent, buffered = 0, 0, list[str]()
    for line in text.splitlines():
        tokens = _TOKEN.findall(line)
        if not buffered:
            indent = len(line) - len(line.lstrip(" "))
        reader.count(len(tokens))
        for symbol in tokens:
            depth += (symbol in _OPEN) - (symbol in _CLOSE)
        buffered += tokens
        if depth <= 0 and buffered:
            yield indent, buffered
            depth, buffered = 0, []


_Lines = list[tuple[str, int, list[str]]]


class _Reader:
    """Reads all code of a file twice: first the declarations of classes and functions, then the functions' bodies."""

    def __init__(self) -> None:
        self.flow = Flow()
        self._left = budgets.MAX_SCRIPT_TOKENS
        self._kinds: dict[tuple[str, str], str] = {}
        """Classes of attributes, by class and attribute."""
        self._parameters: dict[str, tuple[str, ...]] = {}
        """The names of each function's parameters, by its dotted path."""

    def count(self, tokens: int) -> None:
        self._left -= tokens
        if self._left < 0:
            raise _UnparsableError

    def declare(self, lines: _Lines) -> None:
        """Record the classes of attributes and the parameters of functions."""
        owner = ""
        for module, indent, tokens in lines:
            if tokens[0] in {"class", "def"} and indent == 0:
                owner = f"{module}.{tokens[1]}" if tokens[0] == "class" else ""
            if tokens[0] == "def":
                path = f"{owner if indent else module}.{tokens[1]}"
                self._parameters[path] = tuple(_parameters(tokens))
            elif owner and indent == 2 and len(tokens) > 2 and tokens[1] == ":":
                self._kinds[owner, tokens[0]] = tokens[2]
            elif owner and indent == 2 and tokens[0] == "__annotations__" and len(tokens) > 5:
                self._kinds[owner, tokens[2].strip("\"'")] = tokens[5]

    def follow(self, lines: _Lines) -> None:
        """Follow the values through every function."""
        owner, function = "", _Function("")
        for module, indent, tokens in lines:
            if tokens[0] in {"class", "def"} and indent == 0:
                owner = f"{module}.{tokens[1]}" if tokens[0] == "class" else ""
            if tokens[0] == "def":
                path = f"{owner if indent else module}.{tokens[1]}"
                function = _Function(path)
                for index, name in enumerate(self._parameters[path]):
                    is_self = bool(owner) and indent > 0 and index == 0
                    origins = NOTHING if is_self else _origin_of((path, index, "in"))
                    function.names[name] = _Value(origins, owner if is_self else "")
            elif tokens[0] != "class" and (indent > 2 or not owner):
                self._statement(function, tokens)

    def _statement(self, function: _Function, tokens: list[str]) -> None:
        depth, equals = 0, -1
        for position, symbol in enumerate(tokens):
            depth += (symbol in _OPEN) - (symbol in _CLOSE)
            if symbol == "=" and not depth:
                equals = position
                break
        value = _Parser(self, function, tokens, max(equals + 1, 0)).row()
        if tokens[0] == "return":
            self.flow.lead(value.origins, (function.path, "out", ""))
        targets = [symbol for symbol in tokens[:equals] if symbol != ","] if equals > 0 else []
        if tokens[0] == "for" and len(tokens) > 1:
            targets = [tokens[1]]
        items = value.items if value.items is not None and len(targets) == len(value.items) != 1 else None
        for position, name in enumerate(targets):
            self._name(function, name, items[position] if items is not None else value)

    def _name(self, function: _Function, name: str, value: _Value) -> None:
        previous = function.names.get(name)
        if previous is not None and previous.origins:
            # Both branches of a condition may assign the same name.
            value = value._replace(origins=join_origins((previous.origins, value.origins)))
        function.names[name] = value

    def attribute(self, value: _Value, name: str) -> _Value:
        if not value.kind:
            return _UNKNOWN
        return _Value(_origin_of((value.kind, name)), self._kinds.get((value.kind, name), ""))

    def call(self, callee: _Value, name: str, arguments: list[_Value], named: Mapping[str, _Value]) -> _Value:
        """The known facts of the result of a call."""
        if name in _CASTS and len(arguments) > 1:
            return arguments[1]
        if name == "getattr" and len(arguments) > 1:
            return self.attribute(arguments[0], arguments[1].text)
        if callee.function in self._parameters:
            path, is_method = callee.function, bool(callee.kind)
            parameters = self._parameters[path]
            for index, value in enumerate(arguments, start=int(is_method)):
                self.flow.lead(value.origins, (path, index, "in"))
            for key, value in named.items():
                if key in parameters:
                    self.flow.lead(value.origins, (path, parameters.index(key), "in"))
            return _Value(_origin_of((path, "out", "")))
        if name.startswith(_LIBRARIES):
            return self._operation(name.rpartition(".")[2], arguments)
        return _UNKNOWN

    def _operation(self, op: str, arguments: list[_Value]) -> _Value:
        if op in RECURRENT:
            for value in arguments[_RNN_RANGE]:
                self.flow.recur(op, [item.origins for item in value.items or (value,)])
            return _UNKNOWN
        if op in WEIGHT_ARGUMENTS:
            weights = {
                name: arguments[i].origins for name, (i, _) in WEIGHT_ARGUMENTS[op].items() if i < len(arguments)
            }
            transposed = (
                arguments[_TRANSPOSED_INDEX].text if op.lstrip("_") == "convolution" and len(arguments) > 8 else ""
            )
            self.flow.use(op, weights, is_transposed=transposed == "True")
            return _UNKNOWN
        if op in ARITHMETIC:
            return _Value(pass_through(op, join_origins(value.origins for value in arguments[:2])))
        return _Value(pass_through(op, arguments[0].origins)) if arguments else _UNKNOWN


class _Parser:
    """A recursive-descent parser of one line of code, no deeper than the code that PyTorch writes."""

    def __init__(self, reader: _Reader, function: _Function, tokens: list[str], position: int) -> None:
        self._reader, self._function = reader, function
        self._tokens, self._position, self._depth = tokens, position, 0

    def row(self) -> _Value:
        """The value of the items between commas: a tuple, or the item itself if there is only one."""
        values: list[_Value] = []
        named: dict[str, _Value] = {}
        self._items(values, named)
        return values[0] if len(values) == 1 else _list_value(values)

    def _peek(self) -> str:
        return self._tokens[self._position] if self._position < len(self._tokens) else ""

    def _items(self, values: list[_Value], named: dict[str, _Value]) -> None:
        """Read values until a bracket closes."""
        self._depth += 1
        if self._depth > budgets.MAX_SCRIPT_DEPTH:
            raise _UnparsableError
        name = ""
        while (symbol := self._peek()) and symbol not in _CLOSE:
            if symbol in {",", ":"}:
                self._position += 1
                continue
            begin = self._position
            value = self._expression()
            if self._peek() == "=":
                name = self._tokens[begin]
                self._position += 1
            elif name:
                named[name], name = value, ""
            else:
                values.append(value)
        self._depth -= 1

    def _expression(self) -> _Value:
        """Read up to a comma: one value, or several with operators between them."""
        values: list[_Value] = []
        while self._peek() not in _ENDS:
            if (value := self._value()) is not None:
                values.append(value)
        if len(values) == 1:
            return values[0]
        return _Value(join_origins(value.origins for value in values))

    def _value(self) -> _Value | None:
        symbol = self._tokens[self._position]
        self._position += 1
        if symbol in _OPEN:
            value = self._bracket()
            if symbol == "(":
                value = value.items[0] if value.items is not None and len(value.items) == 1 else value
        elif symbol in _STATEMENTS:
            return None
        elif symbol[0].isalpha() or symbol[0] == "_":
            value = self._named(symbol)
        elif symbol[0] in "\"'":
            value = _Value(text=symbol[1:-1])
        else:
            return None
        return self._postfixed(value)

    def _bracket(self) -> _Value:
        values: list[_Value] = []
        self._items(values, {})
        self._position += 1
        return _list_value(values)

    def _called(self, callee: _Value, name: str) -> _Value:
        values: list[_Value] = []
        named: dict[str, _Value] = {}
        self._position += 1
        self._items(values, named)
        self._position += 1
        return self._reader.call(callee, name, values, named)

    def _named(self, symbol: str) -> _Value:
        """Read a name with its attributes, and the call if it is called."""
        first, *rest = symbol.split(".")
        if first == CONSTANTS and len(rest) == 1:
            return _Value(_origin_of((CONSTANTS, rest[0])))
        if first not in self._function.names:
            is_called = self._peek() == "("
            value = _Value(function=symbol, text=symbol)
            return self._called(value, symbol) if is_called else value
        return self._attributes_of(self._function.names[first], rest)

    def _attributes_of(self, value: _Value, names: list[str]) -> _Value:
        """Read attributes of a value; the last may be a method."""
        for index, name in enumerate(names):
            if index == len(names) - 1 and self._peek() == "(":
                return self._called(_Value(kind=value.kind, function=f"{value.kind}.{name}"), name)
            value = self._reader.attribute(value, name)
        if not names and value.function and self._peek() == "(":
            return self._called(value, value.function)
        return value

    def _postfixed(self, value: _Value) -> _Value:
        while (symbol := self._peek()) and symbol not in _ENDS:
            if symbol == "[":
                self._position += 1
                self._bracket()
                value = _Value(value.origins)  # an item of a list or a tuple: it may be any
            elif symbol[0] == "." and len(symbol) > 1:
                self._position += 1
                value = self._attributes_of(value, symbol[1:].split("."))
            else:
                break
        return value


def _origin_of(key: Hashable) -> Origins:
    return frozenset((ValueOrigin(key),))


def _list_value(items: list[_Value]) -> _Value:
    """A list, with the joined origins of its items: joined once, since nested lists could repeat a value endlessly."""
    return _Value(join_origins(item.origins for item in items), items=tuple(items))


def _parameters(tokens: list[str]) -> Iterator[str]:
    """Yield the names of a function's parameters: `def name ( self : kind , x : Tensor = 0 ) -> ...`."""
    depth, is_name = 0, True
    for symbol in tokens[2:]:
        if symbol in _OPEN:
            depth += 1
        elif symbol in _CLOSE:
            depth -= 1
            if not depth:
                return
        elif depth == 1:
            if is_name and symbol != ",":
                yield symbol
            is_name = symbol == ","
