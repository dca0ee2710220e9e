"""The note beside an output that says what it was made from, and by which words."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prunectl.errors import PrunectlError, UsageError, attempt
from prunectl.formats import outputs
from prunectl.formats.table import open_model
from prunectl.measuring import archive

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


def place_of(output: Path) -> Path:
    """Return where the stamp of an output lies."""
    return output.parent / f".{output.name}.prunectl"


def read(output: Path) -> Stamp | None:
    """Return the stamp of an output, if there is one that can be understood."""
    try:
        said = json.loads(place_of(output).read_bytes())
        if said.pop("schema") != SCHEMA:
            return None
        found = Stamp(**said)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    parts = (found.asked, found.read, found.code, found.written)
    return found if all(isinstance(part, dict) for part in parts) else None


def write(output: Path, stamp: Stamp) -> None:
    """Leave a stamp beside its output."""
    text = json.dumps({"schema": SCHEMA, **asdict(stamp)}, indent=2, sort_keys=True) + "\n"
    outputs.write_text(place_of(output), text, is_forced=True)


def digests(paths: Iterable[Path], output: Path) -> dict[str, str]:
    """Return what files hold; one that is not there holds nothing."""
    return {name_of(path, output): _digest(path) for path in paths}


def name_of(path: Path, output: Path) -> str:
    """Return a path as seen from the folder of the output, which .. leads out of, also where that is a link."""
    return os.path.relpath(os.path.join(os.path.realpath(path.parent), path.name), os.path.realpath(output.parent))


def paths(known: Iterable[str], output: Path) -> tuple[Path, ...]:
    """Return where the files of a stamp lie, in the way in which the output is named."""
    places = [os.path.normpath(os.path.join(os.path.realpath(output.parent), name)) for name in known]
    return tuple(Path(place if output.is_absolute() else os.path.relpath(place)) for place in places)


def again(known: Digests, output: Path) -> dict[str, str]:
    """Return what the files of a stamp hold now."""
    return {name: _digest(path) for name, path in zip(known, paths(known, output), strict=True)}


def check(output: Path) -> None:
    """Refuse an output whose stamp has no place."""
    place = place_of(output)
    if os.path.lexists(place) and not place.is_file():
        raise UsageError(f"{place} is where the stamp of {output} goes, and no file", hint="remove it")


def files_of(output: Path) -> tuple[Path, ...]:
    """Return all files that an output consists of."""
    if output.is_dir():
        return tuple(sorted(path for path in output.rglob("*") if path.is_file()))
    found = attempt(open_model, output)
    # Weights without a model around them (.npz) are one file.
    return (output,) if isinstance(found, PrunectlError) else found.files


def difference(old: Stamp, new: Stamp, spell: Callable[[str], str]) -> str:
    """Return in words what is not as it was, options as they are typed; nothing if all is."""
    if old.version != new.version:
        return f"prunectl was {old.version}"
    if old.command != new.command:
        return f"it was made by {old.command}"
    changed = [name for name in {**old.asked, **new.asked} if old.asked.get(name) != new.asked.get(name)]
    if changed:
        return f"{spell(min(changed))} has changed"
    pairs = ((old.read, new.read), (old.code, new.code), (old.written, new.written))
    for before, now in pairs:
        for name in sorted({**before, **now}):
            if before.get(name) != now.get(name):
                return f"{name} {'has changed' if now.get(name) else 'is not there'}"
    return ""


def _digest(path: Path) -> str:
    return archive.sha256_of(path) if path.is_file() else ""
