"""On which line of a TOML file does a key stand? The parser of the standard library does not say."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

Path = tuple[str | int, ...]
"""Keys from the top, with the number of the table in an array of tables."""

_PART = r"""(?:[A-Za-z0-9_-]+|"(?:[^"\\]|\\.)*"|'[^']*')"""
_KEY = rf"{_PART}(?:\s*\.\s*{_PART})*"
_TABLE = re.compile(rf"\s*\[\s*({_KEY})\s*\]")
_TABLES = re.compile(rf"\s*\[\[\s*({_KEY})\s*\]\]")
_PAIR = re.compile(rf"\s*({_KEY})\s*=")
_PARTS = re.compile(_PART)
_TOKEN = re.compile(r'"""|\'\'\'|"(?:[^"\\]|\\.)*"|\'[^\']*\'|#.*|[\[\]{}]')


@dataclass(slots=True)
class Lines:
    """Where keys stand."""

    known: dict[Path, int] = field(default_factory=dict)

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


def scan(text: str) -> Lines:
    """Return where the keys of a TOML text stand, which is known to be TOML."""
    found, around, value = Lines(), Path(), _Value()
    counts: Counter[Path] = Counter()
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


def _parts(text: str) -> Path:
    return tuple(part[1:-1] if part[0] in "\"'" else part for part in _PARTS.findall(text))


def _inside(counts: Counter[Path], name: Path) -> Path:
    """Return a path with the number of the last table wherever it goes through an array of them."""
    path: Path = ()
    for at, part in enumerate(name):
        path = (*path, part)
        if at < len(name) - 1 and path in counts:
            path = (*path, counts[path] - 1)
    return path
