"""One run of a command that makes an output: what it reads, and what it leaves beside."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prunectl import __version__
from prunectl.channels.torch.naming import code_beside
from prunectl.commands import depfile as depfiles
from prunectl.commands import depfile_code, depfile_inputs, if_changed_stamp
from prunectl.commands.if_changed_stamp import Stamp
from prunectl.commands.inputs import STDIN
from prunectl.errors import UsageError
from prunectl.formats import outputs
from prunectl.formats.table import open_model
from prunectl.measuring.patterns import CHANNELS

_FREE = frozenset({"model", "output", "force", "in_place", "dry_run", *depfile_inputs.WRITTEN})
"""What does not decide the bytes, or is told by the files themselves."""


@dataclass(frozen=True, slots=True)
class Making:
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
    def of(cls, command: str, said: Mapping[str, Any], html: Path | None) -> Making:
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
        beside = [Path(said[name]) for name in depfile_inputs.WRITTEN if said.get(name) is not None]
        words = depfile_inputs.meant(said)
        found = cls(
            command,
            dict(said),
            words,
            Path(said["output"]),
            depfile_inputs.files_of(words),
            (*beside, *([html] if html else [])),
        )
        return replace(found, digests=if_changed_stamp.digests(found.files, found.output))

    def stamp(self, code: Mapping[str, str]) -> Stamp:
        """Return the stamp that the output would have as it is now."""
        asked = {name: _plain(value) for name, value in self.said.items() if name not in _FREE}
        written = if_changed_stamp.digests(self.whole(), self.output)
        return Stamp(__version__, self.command, asked, self.digests, code, written)

    def whole(self) -> tuple[Path, ...]:
        """Return the files of the output, and those beside it."""
        return (*if_changed_stamp.files_of(self.output), *self.beside, *_classes(self.output, self.words))

    def places(self) -> tuple[Path, ...]:
        """Return where the output will go, file by file, as far as the format of the model stays."""
        if self.command == "export":
            return ()
        places = outputs.targets(open_model(Path(self.words["model"])), self.output).values()
        return tuple(self.output.parent / place for place in places)

    def watch(self) -> Callable[[], tuple[Path, ...]]:
        """Return what returns the user's modules that were imported since now."""
        before, began_ns = set(sys.modules), time.time_ns()
        # A file is among what the words name, however it is imported.
        known = {path.resolve() for path in self.files}

        def imported() -> tuple[Path, ...]:
            found = depfile_code.imported(before, self.words, began_ns)
            return tuple(path for path in found if path.resolve() not in known)

        return imported

    def leave_fragment(self, depfile: Path, imported: Iterable[Path]) -> None:
        """Write the fragment for make."""
        main, *more = map(str, self.files)
        folders = map(str, depfile_inputs.folders_of(self.words))
        names = dict.fromkeys([main, *more, *folders, *map(os.path.relpath, imported)])
        depfiles.write(depfile, self.output, depfiles.fragment(str(self.output), names, main=main))

    def leave_stamp(self, imported: Iterable[Path]) -> None:
        """Write the stamp beside the output."""
        stamp = self.stamp(if_changed_stamp.digests(imported, self.output))
        if_changed_stamp.write(self.output, stamp)


def check(making: Making, depfile: Path | None, *, has_stamp: bool) -> None:
    """Refuse what cannot be kept, before any work begins."""
    if depfile is not None:
        depfiles.check(depfile, making.output, (*making.files, making.output, *making.beside))
        for path in (making.output, *making.files, *depfile_inputs.folders_of(making.words)):
            depfiles.escaped(str(path))
    if has_stamp:
        if_changed_stamp.check(making.output)
    for name in depfile_inputs.SPECS if has_stamp else ():
        if making.words.get(name) and depfile_inputs.is_code(making.words[name]):
            raise UsageError(
                f"--if-changed cannot know what {making.words[name]} reads",
                hint="save its examples to a file, or leave out --if-changed",
            )


def _classes(output: Path, words: Mapping[str, Any]) -> tuple[Path, ...]:
    """Return the Python file that comes with weights of PyTorch: its class, where one is written."""
    if not words.get("code") and words.get("pattern") != CHANNELS:
        return ()
    place = code_beside(output)
    return (place,) if place.is_file() else ()


def _plain(value: Any) -> Any:
    """Return a value as JSON has it."""
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value if value is None or isinstance(value, bool | int | float) else str(value)
