"""The note beside an output that says what it was made from, and by which words."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from prunectl import __version__
from prunectl.analysis import sizes
from prunectl.analysis.patterns import CHANNEL
from prunectl.commands._command import STDIN
from prunectl.commands.build import depfile
from prunectl.commands.build import depfile as build_depfile
from prunectl.commands.build import depfile as depfiles
from prunectl.errors import PrunectlError, UsageError, attempt
from prunectl.formats import atomic
from prunectl.formats.registry import open_model
from prunectl.pruning.destination import code_beside

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
    """Return where the stamp of an output lies."""
    return output.parent / f".{output.name}.prunectl"


def read(output: Path) -> Stamp | None:
    """Return the stamp of an output, if there is one that can be understood."""
    try:
        said = json.loads(stamp_path(output).read_bytes())
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
    atomic.write_text(stamp_path(output), text, is_forced=True)


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


def rehash(known: Digests, output: Path) -> dict[str, str]:
    """Return what the files of a stamp hold now."""
    return {name: _digest(path) for name, path in zip(known, paths(known, output), strict=True)}


def check(output: Path) -> None:
    """Refuse an output whose stamp has no place."""
    place = stamp_path(output)
    if os.path.lexists(place) and not place.is_file():
        raise UsageError(f"{place} is where the stamp of {output} goes, and no file", hint="remove it")


def files_of(output: Path) -> tuple[Path, ...]:
    """Return all files that an output consists of."""
    if output.is_dir():
        return tuple(sorted(path for path in output.rglob("*") if path.is_file()))
    found = attempt(open_model, output)
    # Weights without a model around them (.npz) are one file.
    return (output,) if isinstance(found, PrunectlError) else found.files


def first_difference(old: Stamp, new: Stamp, spell: Callable[[str], str]) -> str:
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
    return sizes.sha256_of(path) if path.is_file() else ""


_FREE = frozenset({"model", "output", "force", "in_place", "dry_run", *build_depfile.OUTPUT_OPTIONS})
"""What does not decide the bytes, or is told by the files themselves."""


@dataclass(frozen=True, slots=True)
class BuildStep:
    """What was typed, and the files that it names."""

    command: str
    said: Mapping[str, Any]
    words: Mapping[str, Any]
    """The same with what a recipe says."""
    output: Path
    files: tuple[Path, ...]
    beside: tuple[Path, ...]
    """Files that are written with the output: a manifest, a page."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """Of the files, taken before any of them is read."""

    @classmethod
    def of(cls, command: str, said: Mapping[str, Any], html: Path | None) -> BuildStep:
        """Return what was typed as a making, and refuse what makes no file of files."""
        for name, is_so in (
            ("-o -", said["output"] == STDIN),
            ("a model from standard input", said["model"] == STDIN),
            ("--in-place", bool(said.get("in_place"))),
            ("--dry-run", bool(said.get("dry_run"))),
        ):
            if is_so:
                raise UsageError(
                    f"--depfile and --if-changed are about an output and the files that it is made of, not {name}"
                )
        if not said["output"]:
            raise UsageError("where to? say --output")
        beside = [Path(said[name]) for name in build_depfile.OUTPUT_OPTIONS if said.get(name) is not None]
        words = build_depfile.with_recipe(said)
        found = cls(
            command,
            dict(said),
            words,
            Path(said["output"]),
            build_depfile.files_of(words),
            (*beside, *([html] if html else [])),
        )
        return replace(found, digests=digests(found.files, found.output))

    def stamp(self, code: Mapping[str, str]) -> Stamp:
        """Return the stamp that the output would have as it is now."""
        asked = {name: _plain(value) for name, value in self.said.items() if name not in _FREE}
        written = digests(self.whole(), self.output)
        return Stamp(__version__, self.command, asked, self.digests, code, written)

    def whole(self) -> tuple[Path, ...]:
        """Return the files of the output, and those beside it."""
        return (*files_of(self.output), *self.beside, *_classes(self.output, self.words))

    def places(self) -> tuple[Path, ...]:
        """Return where the output will go, file by file, as far as the format of the model stays."""
        if self.command == "export":
            return ()
        places = atomic.targets(open_model(Path(self.words["model"])), self.output).values()
        return tuple(self.output.parent / place for place in places)

    def watch(self) -> Callable[[], tuple[Path, ...]]:
        """Return what returns the user's modules that were imported since now."""
        before, began_ns = set(sys.modules), time.time_ns()
        # A file is among what the words name, however it is imported.
        known = {path.resolve() for path in self.files}

        def imported() -> tuple[Path, ...]:
            found = depfile.user_modules(before, self.words, began_ns)
            return tuple(path for path in found if path.resolve() not in known)

        return imported

    def leave_fragment(self, depfile: Path, imported: Iterable[Path]) -> None:
        """Write the fragment for make."""
        main, *more = map(str, self.files)
        folders = map(str, build_depfile.folders_of(self.words))
        names = dict.fromkeys([main, *more, *folders, *map(os.path.relpath, imported)])
        depfiles.write(depfile, self.output, depfiles.make_rule(str(self.output), names, main=main))

    def leave_stamp(self, imported: Iterable[Path]) -> None:
        """Write the stamp beside the output."""
        stamp = self.stamp(digests(imported, self.output))
        write(self.output, stamp)


def check_build(making: BuildStep, depfile: Path | None, *, has_stamp: bool) -> None:
    """Refuse what cannot be kept, before any work begins."""
    if depfile is not None:
        depfiles.check(depfile, making.output, (*making.files, making.output, *making.beside))
        for path in (making.output, *making.files, *build_depfile.folders_of(making.words)):
            depfiles.make_escaped(str(path))
    if has_stamp:
        check(making.output)
    for name in build_depfile.CALLABLE_OPTIONS if has_stamp else ():
        if making.words.get(name) and build_depfile.is_callable_spec(making.words[name]):
            raise UsageError(
                f"--if-changed cannot know what {making.words[name]} reads",
                hint="save its examples to a file, or leave out --if-changed",
            )


def _classes(output: Path, words: Mapping[str, Any]) -> tuple[Path, ...]:
    """Return the Python file that comes with weights of PyTorch: its class, where one is written."""
    if not words.get("code") and words.get("pattern") != CHANNEL:
        return ()
    place = code_beside(output)
    return (place,) if place.is_file() else ()


def _plain(value: Any) -> Any:
    """Return a value as JSON has it."""
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def check_unmodified(making: BuildStep, old: Stamp, place: Path | None = None) -> None:
    """Refuse to replace what is not as it was written with a stamp: of the output, or of what is beside it.

    With a place, only what is there is looked at.
    """
    known = paths(old.written, making.output)
    inputs = {path.resolve() for path in making.files}
    for path in (*making.whole(), *making.places(), *known):
        if not os.path.lexists(path) or path.resolve() in inputs:
            continue
        if place is not None and not path.absolute().is_relative_to(place.absolute()):
            continue
        ((name, digest),) = digests([path], making.output).items()
        if digest != old.written.get(name):
            is_known = name in old.written
            what = "has changed since prunectl wrote it" if is_known else f"was not written with {making.output}"
            raise UsageError(f"{path} {what}", hint="write elsewhere, or replace it with --force")
