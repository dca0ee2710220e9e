"""What the code of a TorchScript file declares: which attributes of a module are its parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from prunectl.formats.zips import Archive

MAX_CODE_BYTES = 4 << 20
"""Code beyond this is not looked at; the names alone tell the roles then."""
_CLASS = re.compile(r"^class (\w+)\(Module\):$")
_PARAMETERS = re.compile(r"^  __parameters__ = \[(.*)\]$")
_NAME = re.compile(r'"([^"]*)"')


def code(archive: Archive, folder: str) -> tuple[Sequence[tuple[str, str]], bool]:
    """Return the code as pairs of a dotted path and a text, and whether it is there and all of it."""
    found: list[tuple[str, str]] = []
    left, is_whole = MAX_CODE_BYTES, True
    for name, entry in archive.entries.items():
        if not name.startswith(f"{folder}code/") or not name.endswith(".py"):
            continue
        if entry.nbytes > left:
            is_whole = False
            continue
        left -= entry.nbytes
        module = name.removeprefix(f"{folder}code/").removesuffix(".py").replace("/", ".")
        found.append((module, archive.read(name, entry.nbytes).decode("utf-8", "replace")))
    return found, is_whole and bool(found)


def parameters(modules: Sequence[tuple[str, str]]) -> Mapping[str, frozenset[str]]:
    """Return the parameters of each class of module, by the dotted path of the class."""
    found: dict[str, frozenset[str]] = {}
    for module, text in modules:
        owner = ""
        for line in text.splitlines():
            if is_class := _CLASS.match(line):
                owner = f"{module}.{is_class[1]}"
            elif owner and (declared := _PARAMETERS.match(line)):
                found[owner] = frozenset(_NAME.findall(declared[1]))
    return found
