"""Which file holds the budgets? The nearest one, upwards from where we are."""

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
"""Keys from the top, with the number of the table in an array of tables."""

_PART = r"""(?:[A-Za-z0-9_-]+|"(?:[^"\\]|\\.)*"|'[^']*')"""
_KEY = rf"{_PART}(?:\s*\.\s*{_PART})*"
_TABLE = re.compile(rf"\s*\[\s*({_KEY})\s*\]")
_TABLES = re.compile(rf"\s*\[\[\s*({_KEY})\s*\]\]")
_PAIR = re.compile(rf"\s*({_KEY})\s*=")
_PARTS = re.compile(_PART)
_TOKEN = re.compile(r'"""|\'\'\'|"(?:[^"\\]|\\.)*"|\'[^\']*\'|#.*|[\[\]{}]')


@dataclass(slots=True)
class KeyLines:
    """Where keys stand."""

    known: dict[KeyPath, int] = field(default_factory=dict)

    def of(self, *path: str | int) -> int:
        """Return the line of a key, or of the nearest one around it; counted from one."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.known:
                return self.known[path[:length]]
        return 1


@dataclass(slots=True)
class _Value:
    """How far a value reaches over the lines."""

    depth: int = 0
    quotes: str = ""

    @property
    def is_open(self) -> bool:
        return bool(self.depth or self.quotes)

    def take(self, text: str) -> None:
        """Go on through a line of it."""
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
    """Return where the keys of a TOML text stand, which is known to be TOML."""
    found, around, value = KeyLines(), KeyPath(), _Value()
    counts: Counter[KeyPath] = Counter()
    for number, line in enumerate(text.splitlines(), 1):
        if value.is_open:
            value.take(line)
        elif match := _TABLES.match(line):
            name = _inside(counts, _parts(match[1]))
            around = (*name, counts[name])
            counts[name] += 1
            found.known.setdefault(name, number)
            found.known[around] = number
        elif match := _TABLE.match(line):
            around = _inside(counts, _parts(match[1]))
            found.known.setdefault(around, number)
        elif match := _PAIR.match(line):
            path = (*around, *_parts(match[1]))
            for length in range(len(around) + 1, len(path) + 1):
                found.known.setdefault(path[:length], number)
            value.take(line[match.end() :])
    return found


def _parts(text: str) -> KeyPath:
    return tuple(part[1:-1] if part[0] in "\"'" else part for part in _PARTS.findall(text))


def _inside(counts: Counter[KeyPath], name: KeyPath) -> KeyPath:
    """Return a path with the number of the last table wherever it goes through an array of them."""
    path: KeyPath = ()
    for at, part in enumerate(name):
        path = (*path, part)
        if at < len(name) - 1 and path in counts:
            path = (*path, counts[path] - 1)
    return path


OWN, SHARED = "prunectl.toml", "pyproject.toml"


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """The table of budgets in a file, not yet understood."""

    path: Path
    table: dict[str, Any]
    prefix: tuple[str, ...]
    """Where in the file it stands."""
    lines: KeyLines

    def line(self, *path: str | int) -> int:
        """Return the line of a key in the table."""
        return self.lines.of(*self.prefix, *path)

    def place(self, *path: str | int) -> str:
        """Return file and line of a key, as compilers write them."""
        return f"{os.path.relpath(self.path)}:{self.line(*path)}"


def find_config(folder: Path) -> ConfigFile:
    """Return the table of budgets in the nearest folder upwards that has one."""
    for place in (folder, *folder.parents):
        if (place / OWN).is_file():
            return load_config(place / OWN)
        if (place / SHARED).is_file():
            found = load_config(place / SHARED, is_shared=True)
            if found.table:
                return found
    raise UsageError(
        f"there is no {OWN} in {folder} or above it, nor a {SHARED} with [tool.prunectl]",
        hint="prunectl init writes one, with limits a little above what the models are now",
    )


def load_config(path: Path, *, is_shared: bool | None = None) -> ConfigFile:
    """Return the table of budgets in a file."""
    try:
        text = path.read_text(encoding="utf-8")
        whole = tomllib.loads(text)
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist", hint="prunectl init writes one") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not TOML: {error}") from error
    if not (path.name == SHARED if is_shared is None else is_shared):
        return ConfigFile(path, whole, (), scan_keys(text))
    tool = whole.get("tool", {})
    table = tool.get("prunectl", {}) if isinstance(tool, dict) else {}
    if not isinstance(table, dict):
        raise UsageError(f"{path}: tool.prunectl is not a table")
    return ConfigFile(path, table, ("tool", "prunectl"), scan_keys(text))
