"""A fragment for make that says which files a result was made from."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

from prunectl.commands.inputs import STDIN
from prunectl.errors import UsageError
from prunectl.formats import outputs

_EQUALS = "prunectl_equals"
_HEAD = f"{_EQUALS} := =\n"
_ESCAPES = {" ": "\\ ", "#": "\\#", ":": "\\:", "*": "\\*", "?": "\\?", "[": "\\[", "$": "$$", "=": f"$({_EQUALS})"}
_UNSPEAKABLE = re.compile(r"[;|%\\]|[\x00-\x1f\x7f]|^~|[ &]$")
"""What make gives a meaning to that nothing takes away again."""


def fragment(target: str, prerequisites: Iterable[str], *, main: str) -> str:
    """Return a rule without a recipe, and an empty one for every prerequisite but the main one, as `gcc -MP` does."""
    words = [escaped(name) for name in prerequisites]
    lines = [f"{escaped(target)}: {' '.join(words)}", *(f"\n{word}:" for word in words if word != escaped(main))]
    # An equals sign would make a variable of the rule, and has no escape but this.
    head = _HEAD if any(f"$({_EQUALS})" in line for line in lines) else ""
    return head + "\n".join(lines) + "\n"


def escaped(name: str) -> str:
    """Return a file name as make reads it."""
    if _UNSPEAKABLE.search(name):
        raise UsageError(f"make has no way to write the file name {name!r}", hint="rename it, or leave out --depfile")
    return "".join(_ESCAPES.get(letter, letter) for letter in name)


def check(depfile: Path, target: Path, taken: Iterable[Path]) -> None:
    """Refuse a place where nothing can be written, or where something else is, before any work begins."""
    if str(depfile) == STDIN:
        raise UsageError("--depfile writes a file, not to standard output", hint="--depfile OUT.d")
    if not depfile.absolute().parent.is_dir():
        raise UsageError(f"{depfile.parent} is not a folder", hint=f"mkdir -p {depfile.parent}")
    if depfile.is_dir() or depfile.resolve() in {path.resolve() for path in taken}:
        raise UsageError(f"{depfile} is no place for a depfile", hint="--depfile OUT.d")
    _check_free(depfile, target)
    check_folder(depfile.absolute().parent)


def check_folder(folder: Path) -> None:
    """Refuse a folder that takes no files."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"{folder} cannot be written to: {error.strerror}") from error


def write(depfile: Path, target: Path, text: str) -> None:
    """Write the fragment, whole or not at all."""
    # Whatever came to be there while the command worked stays.
    _check_free(depfile, target)
    outputs.write_text(depfile, text, is_forced=True)


def _check_free(depfile: Path, target: Path) -> None:
    if os.path.lexists(depfile) and not (depfile.is_file() and _is_fragment(depfile.read_bytes(), target)):
        raise UsageError(f"{depfile} exists, and is no depfile of {target}", hint="name another file, or remove it")


def _is_fragment(content: bytes, target: Path) -> bool:
    """Whether a file has nothing but what a fragment for a target has.

    A comment that says so would do for make, but other programs that read depfiles know none.
    """
    lines = content.decode(errors="replace").removeprefix(_HEAD).splitlines() or [""]
    name, colon, words = lines[0].partition(": ")
    known = {f"{word}:" for word in re.split(r"(?<!\\) ", words)}
    is_about = f"/{name}".endswith(f"/{escaped(target.name)}")
    return not content or (bool(colon) and is_about and all(not line or line in known for line in lines[1:]))
