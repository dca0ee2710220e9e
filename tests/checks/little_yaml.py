"""Reads as much of YAML as the files of this project use: mappings, lists, texts over several lines."""

from __future__ import annotations

import re
from typing import Any

_PAIR = re.compile(r"([A-Za-z0-9_-]+):(?: (.*))?$")
_WORDS = {"true": True, "false": False}


def read(text: str) -> Any:
    """Return what a YAML text holds."""
    lines = [line.rstrip() for line in text.splitlines()]
    value, rest = _block(lines, 0)
    assert not any(line.strip() for line in lines[rest:]), lines[rest]
    return value


def _block(lines: list[str], at: int) -> tuple[Any, int]:
    at = _skip(lines, at)
    depth = _depth(lines[at])
    return _list(lines, at, depth) if lines[at].lstrip().startswith("- ") else _mapping(lines, at, depth)


def _mapping(lines: list[str], at: int, depth: int) -> tuple[dict[str, Any], int]:
    found: dict[str, Any] = {}
    while at < len(lines) and _depth(lines[at]) == depth and not lines[at].lstrip().startswith("- "):
        match = _PAIR.fullmatch(lines[at].strip())
        assert match, lines[at]
        assert match[1] not in found, lines[at]
        if match[2] == "|":
            found[match[1]], at = _text(lines, at + 1, depth)
        elif match[2]:
            found[match[1]], at = _scalar(match[2]), at + 1
        else:
            found[match[1]], at = _block(lines, at + 1)
        at = _skip(lines, at)
    return found, at


def _list(lines: list[str], at: int, depth: int) -> tuple[list[Any], int]:
    found: list[Any] = []
    while at < len(lines) and _depth(lines[at]) == depth and lines[at].lstrip().startswith("- "):
        inner = lines[at].lstrip().removeprefix("- ")
        if _PAIR.fullmatch(inner):
            lines[at] = " " * (depth + 2) + inner
            value, at = _mapping(lines, at, depth + 2)
        else:
            value, at = _scalar(inner), at + 1
        found.append(value)
        at = _skip(lines, at)
    return found, at


def _text(lines: list[str], at: int, depth: int) -> tuple[str, int]:
    first = _depth(lines[at])
    assert first > depth
    end = at
    while end < len(lines) and (not lines[end] or _depth(lines[end]) >= first):
        end += 1
    return "\n".join(line[first:] for line in lines[at:end]).rstrip("\n") + "\n", end


def _scalar(text: str) -> Any:
    if text[0] == text[-1] == "'":
        return text[1:-1].replace("''", "'")
    if text[0] == text[-1] == '"':
        assert "\\" not in text
        return text[1:-1]
    if text[0] == "[":
        return [_scalar(item.strip()) for item in text[1:-1].split(",")]
    text = text.partition(" #")[0].rstrip()
    # What would mean something else in YAML is not written here.
    assert not re.search(r"^[&*!|>@`%{]|: ", text), text
    return _WORDS.get(text, int(text) if text.isdecimal() else text)


def _depth(line: str) -> int:
    return len(line) - len(line.lstrip())


def _skip(lines: list[str], at: int) -> int:
    while at < len(lines) and (not lines[at].strip() or lines[at].lstrip().startswith("#")):
        at += 1
    return at
