"""What the code of a TorchScript file declares: which attributes of a module are its parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping

from prunectl.formats.zips import Archive

MAX_CODE_BYTES = 4 << 20
"""Code beyond this is not looked at; the names alone tell the roles then."""
_CLASS = re.compile(r"^class (\w+)\(Module\):$")
_PARAMETERS = re.compile(r"^  __parameters__ = \[(.*)\]$")
_NAME = re.compile(r'"([^"]*)"')


def parameters(archive: Archive, folder: str) -> Mapping[str, frozenset[str]]:
    """Return the parameters of each class of module, by the dotted path of the class."""
    found: dict[str, frozenset[str]] = {}
    left = MAX_CODE_BYTES
    for name, entry in archive.entries.items():
        if not name.startswith(f"{folder}code/") or not name.endswith(".py") or entry.nbytes > left:
            continue
        left -= entry.nbytes
        module = name.removeprefix(f"{folder}code/").removesuffix(".py").replace("/", ".")
        owner = ""
        for line in archive.read(name, entry.nbytes).decode("utf-8", "replace").splitlines():
            if is_class := _CLASS.match(line):
                owner = f"{module}.{is_class[1]}"
            elif owner and (declared := _PARAMETERS.match(line)):
                found[owner] = frozenset(_NAME.findall(declared[1]))
    return found
