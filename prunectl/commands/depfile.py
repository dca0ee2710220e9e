"""A fragment for make that says which files a result was made from."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from prunectl.errors import PrunectlError, UsageError, attempt
from prunectl.formats import outputs
from prunectl.formats.table import recognise

_EQUALS = "prunectl_equals"
_ESCAPES = {" ": "\\ ", "#": "\\#", ":": "\\:", "*": "\\*", "?": "\\?", "[": "\\[", "$": "$$", "=": f"$({_EQUALS})"}
_UNSPEAKABLE = re.compile(r"[;|%\\]|[\x00-\x1f\x7f]|^~|[ &]$")
"""What make gives a meaning to that nothing takes away again."""


def fragment(target: str, prerequisites: Iterable[str], *, main: str) -> str:
    """Return a rule without a recipe, and an empty one for every prerequisite but the main one, as `gcc -MP` does."""
    words = [escaped(name) for name in prerequisites]
    lines = [f"{escaped(target)}: {' '.join(words)}", *(f"\n{word}:" for word in words if word != escaped(main))]
    # An equals sign would make a variable of the rule, and has no escape but this.
    head = f"{_EQUALS} := =\n" if any(f"$({_EQUALS})" in line for line in lines) else ""
    return head + "\n".join(lines) + "\n"


def escaped(name: str) -> str:
    """Return a file name as make reads it."""
    if _UNSPEAKABLE.search(name):
        raise UsageError(f"make has no way to write the file name {name!r}", hint="rename it, or leave out --depfile")
    return "".join(_ESCAPES.get(letter, letter) for letter in name)


def check(depfile: Path, taken: Iterable[Path]) -> None:
    """Refuse a place where nothing can be written, or where something else is, before any work begins."""
    if not depfile.absolute().parent.is_dir():
        raise UsageError(f"{depfile.parent} is not a folder", hint=f"mkdir -p {depfile.parent}")
    places = {path.resolve() for path in taken}
    is_model = depfile.is_file() and not isinstance(attempt(recognise, depfile), PrunectlError)
    if depfile.is_dir() or is_model or depfile.resolve() in places:
        raise UsageError(f"{depfile} is no place for a depfile", hint="--depfile OUT.d")


def write(depfile: Path, text: str) -> None:
    """Write the fragment, whole or not at all."""
    outputs.write_text(depfile, text, is_forced=True)
