"""The stamp beside an output: the options and the digests of all files that decided its bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prunectl.analysis import sizes
from prunectl.errors import PrunectlError, UsageError, attempt
from prunectl.formats import atomic
from prunectl.formats.registry import open_model

SCHEMA = "prunectl.stamp/1"
Digests = Mapping[str, str]
"""SHA-256 by the path as seen from the folder of the output."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """What decided the bytes of an output."""

    version: str
    command: str
    asked: Mapping[str, Any]
    """The options, but for those that say where to."""
    read: Digests
    code: Digests
    """Modules of the user's that were imported."""
    written: Digests


def stamp_path(output: Path) -> Path:
    """Where the stamp of an output lies."""
    return output.parent / f".{output.name}.prunectl"


def read(output: Path) -> Stamp | None:
    """Read the stamp of an output, if there is one that can be understood."""
    try:
        fields = json.loads(stamp_path(output).read_bytes())
        if fields.pop("schema") != SCHEMA:
            return None
        stamp = Stamp(**fields)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    parts = (stamp.asked, stamp.read, stamp.code, stamp.written)
    return stamp if all(isinstance(part, dict) for part in parts) else None


def write(output: Path, stamp: Stamp) -> None:
    """Write a stamp beside its output, whole or not at all."""
    text = json.dumps({"schema": SCHEMA, **asdict(stamp)}, indent=2, sort_keys=True) + "\n"
    atomic.write_text(stamp_path(output), text, is_forced=True)


def check(output: Path) -> None:
    """Reject an output whose stamp cannot be written, because something else has its name."""
    path = stamp_path(output)
    if os.path.lexists(path) and not path.is_file():
        raise UsageError(f"{path} is where the stamp of {output} goes, and no file", hint="remove it")


def digests(files: Iterable[Path], output: Path) -> dict[str, str]:
    """SHA-256 of files by their names in a stamp; empty where there is no file."""
    return {name_of(path, output): _digest(path) for path in files}


def rehash(known: Digests, output: Path) -> dict[str, str]:
    """Hash the files of a stamp again, as they are now."""
    return {name: _digest(path) for name, path in zip(known, paths(known, output), strict=True)}


def _digest(path: Path) -> str:
    return sizes.sha256_of(path) if path.is_file() else ""


def name_of(path: Path, output: Path) -> str:
    """A path as seen from the folder of the output, which .. leads out of, also where that is a link."""
    return os.path.relpath(os.path.join(os.path.realpath(path.parent), path.name), os.path.realpath(output.parent))


def paths(known: Iterable[str], output: Path) -> tuple[Path, ...]:
    """The files of a stamp, relative or absolute as the output is."""
    absolute = [os.path.normpath(os.path.join(os.path.realpath(output.parent), name)) for name in known]
    return tuple(Path(path if output.is_absolute() else os.path.relpath(path)) for path in absolute)


def files_of(output: Path) -> tuple[Path, ...]:
    """All files that an output consists of."""
    if output.is_dir():
        return tuple(sorted(path for path in output.rglob("*") if path.is_file()))
    model = attempt(open_model, output)
    # Weights without a model around them (.npz) are one file.
    return (output,) if isinstance(model, PrunectlError) else model.files


def first_difference(old: Stamp, new: Stamp, option_name: Callable[[str], str]) -> str:
    """Why an output is out of date, with options as they are typed; empty if it is not."""
    if old.version != new.version:
        return f"prunectl was {old.version}"
    if old.command != new.command:
        return f"it was made by {old.command}"
    changed = [name for name in {**old.asked, **new.asked} if old.asked.get(name) != new.asked.get(name)]
    if changed:
        return f"{option_name(min(changed))} has changed"
    for before, after in ((old.read, new.read), (old.code, new.code), (old.written, new.written)):
        for name in sorted({**before, **after}):
            if before.get(name) != after.get(name):
                return f"{name} {'has changed' if after.get(name) else 'is not there'}"
    return ""
