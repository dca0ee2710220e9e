"""The config file of budgets, in the nearest folder upwards, and the line of each key."""

from __future__ import annotations

import os
import re
import tomllib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunectl.errors import UsageError

KeyPath = tuple[str | int, ...]
"""Keys from the top level on; the key of an array of tables is followed by the index of the table."""

_PART = r"""(?:[A-Za-z0-9_-]+|"(?:[^"\\]|\\.)*"|'[^']*')"""
_KEY = rf"{_PART}(?:\s*\.\s*{_PART})*"
_TABLE = re.compile(rf"\s*\[\s*({_KEY})\s*\]")
_TABLES = re.compile(rf"\s*\[\[\s*({_KEY})\s*\]\]")
_PAIR = re.compile(rf"\s*({_KEY})\s*=")
_PARTS = re.compile(_PART)
_TOKEN = re.compile(r'"""|\'\'\'|"(?:[^"\\]|\\.)*"|\'[^\']*\'|#.*|[\[\]{}]')


@dataclass(slots=True)
class KeyLines:
    """Lines of the keys of a TOML file."""

    lines: dict[KeyPath, int] = field(default_factory=dict)

    def of(self, *path: str | int) -> int:
        """The line of a key (the first line is 1), or else of its nearest parent."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.lines:
                return self.lines[path[:length]]
        return 1


@dataclass(slots=True)
class _ValueSpan:
    """Scanner state of a value that may span several lines."""

    depth: int = 0
    quotes: str = ""

    @property
    def is_open(self) -> bool:
        return bool(self.depth or self.quotes)

    def take(self, text: str) -> None:
        """Scan one more line of the value."""
        while text:
            if self.quotes:
                _, end, text = text.partition(self.quotes)
                if not end:
                    return
                self.quotes = ""
                continue
            match = _TOKEN.search(text)
            if match is None:
                return
            token, text = match[0], text[match.end() :]
            if token in {'"""', "'''"}:
                self.quotes = token
            elif token in {"[", "{"}:
                self.depth += 1
            elif token in {"]", "}"}:
                self.depth -= 1


def scan_keys(text: str) -> KeyLines:
    """Lines of the keys of a valid TOML text."""
    key_lines, table, value = KeyLines(), KeyPath(), _ValueSpan()
    counts: Counter[KeyPath] = Counter()
    for number, line in enumerate(text.splitlines(), 1):
        if value.is_open:
            value.take(line)
        elif match := _TABLES.match(line):
            name = _with_indices(counts, _parts(match[1]))
            table = (*name, counts[name])
            counts[name] += 1
            key_lines.lines.setdefault(name, number)
            key_lines.lines[table] = number
        elif match := _TABLE.match(line):
            table = _with_indices(counts, _parts(match[1]))
            key_lines.lines.setdefault(table, number)
        elif match := _PAIR.match(line):
            path = (*table, *_parts(match[1]))
            for length in range(len(table) + 1, len(path) + 1):
                key_lines.lines.setdefault(path[:length], number)
            value.take(line[match.end() :])
    return key_lines


def _parts(text: str) -> KeyPath:
    return tuple(part[1:-1] if part[0] in "\"'" else part for part in _PARTS.findall(text))


def _with_indices(counts: Counter[KeyPath], name: KeyPath) -> KeyPath:
    """The path, with the index of the last table after each key of an array of tables."""
    path: KeyPath = ()
    for depth, part in enumerate(name):
        path = (*path, part)
        if depth < len(name) - 1 and path in counts:
            path = (*path, counts[path] - 1)
    return path


OWN, SHARED = "prunectl.toml", "pyproject.toml"


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """The table of budgets in a file, not yet parsed."""

    path: Path
    table: dict[str, Any]
    prefix: tuple[str, ...]
    """Keys of the table in the file: none, or tool.prunectl."""
    lines: KeyLines

    def line(self, *path: str | int) -> int:
        """The line of a key in the table."""
        return self.lines.of(*self.prefix, *path)

    def location(self, *path: str | int) -> str:
        """File and line of a key as `FILE:LINE`."""
        return f"{os.path.relpath(self.path)}:{self.line(*path)}"


def find_config(folder: Path) -> ConfigFile:
    """The table of budgets in this folder, or else in the nearest parent folder that has one."""
    for candidate in (folder, *folder.parents):
        if (candidate / OWN).is_file():
            return load_config(candidate / OWN)
        if (candidate / SHARED).is_file():
            config = load_config(candidate / SHARED, is_shared=True)
            if config.table:
                return config
    raise UsageError(
        f"no {OWN}, and no {SHARED} with [tool.prunectl], was found in {folder} or above it",
        hint="write one with: prunectl init",
    )


def load_config(path: Path, *, is_shared: bool | None = None) -> ConfigFile:
    """The table of budgets in a file."""
    try:
        # Some Windows editors write a byte order mark.
        text = path.read_text(encoding="utf-8-sig")
        document = tomllib.loads(text)
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist", hint="write one with: prunectl init") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not TOML: it is not UTF-8", hint="save it as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not TOML: {error}") from error
    if not (path.name == SHARED if is_shared is None else is_shared):
        return ConfigFile(path, document, (), scan_keys(text))
    tool = document.get("tool", {})
    table = tool.get("prunectl", {}) if isinstance(tool, dict) else {}
    if not isinstance(table, dict):
        raise UsageError(f"{path}: tool.prunectl is not a table")
    return ConfigFile(path, table, ("tool", "prunectl"), scan_keys(text))
