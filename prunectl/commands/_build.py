"""`--depfile` and `--if-changed`: what makes a command fit into a build."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from prunectl import __version__
from prunectl.analysis import sizes
from prunectl.analysis.patterns import CHANNEL
from prunectl.commands import _depfile as depfiles
from prunectl.commands._command import STDIN, option_name
from prunectl.commands._requests import BuildOptions, OutputOptions
from prunectl.errors import PrunectlError, UsageError, attempt
from prunectl.formats import atomic
from prunectl.formats.detect import URL
from prunectl.formats.registry import open_model
from prunectl.pruning.destination import code_beside, planned_files
from prunectl.reporting.report import Artifact, Report, Table
from prunectl.reporting.reporter import Reporter


def run_step(ctx: Any, options: Any, build: BuildOptions) -> int:
    """Run a command, unless its output is up to date; write the depfile and the stamp when it has succeeded."""
    depfile, if_changed = build.depfile, build.if_changed
    reporter: Reporter = ctx.obj
    step = BuildStep.of(str(ctx.command.name), options, ctx.params, reporter.html)
    step.check(depfile, has_stamp=if_changed)
    old = read_stamp(step.output) if if_changed else None
    guard: AbstractContextManager[None] = nullcontext()
    if old is not None:
        reason = first_difference(old, step.restamped(old), partial(option_name, ctx))
        if not reason:
            notes = step.write_files(depfile, stamped_paths(old.code, step.output), has_stamp=False)
            return replace(reporter, html=None).show(_up_to_date(step.output, notes))
        if not options.force:
            check_unmodified(step, old)
            # The files that are there were written by this command, so replacing them needs no --force.
            options = replace(options, force=True)
            # Checked again when the work is done: a file may have changed meanwhile.
            guard = atomic.guarded(partial(check_unmodified, step, old))
        reporter.note(f"{step.output} is rebuilt: {reason}")
    imported = step.track_imports()
    ctx.obj = replace(reporter, on_success=lambda: step.write_files(depfile, imported(), has_stamp=if_changed))
    with guard:
        return int(options.run(ctx))


def _up_to_date(output: Path, notes: tuple[str, ...]) -> Report:
    nbytes = sum(path.stat().st_size for path in output_files(output))
    return Report(
        models=(),
        table=Table("", (), ()),
        artifacts=(Artifact(str(output), nbytes),),
        notes=(f"{output} is up to date.", *notes),
        quiet_lines=(),
        extra_json={"up_to_date": True},
    )


_NOT_STAMPED = frozenset({"model", "output", "force", "in_place", "dry_run", "manifest", "card"})
"""Options that do not affect the bytes of the output, or only by the files that they name."""


@dataclass(frozen=True, slots=True)
class BuildStep:
    """A command with its options, the files that it reads, and those that it writes."""

    command: str
    params: Mapping[str, Any]
    options: Mapping[str, Any]
    """The options, with those of a recipe."""
    output: Path
    files: tuple[Path, ...]
    side_outputs: tuple[Path, ...]
    """Files that are written with the output: a manifest, a page."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """Digests of the files, computed before any of them is read."""

    @classmethod
    def of(cls, command: str, typed: OutputOptions, params: Mapping[str, Any], html: Path | None) -> BuildStep:
        """Collect the files of a command; reject standard input and output, and a dry run."""
        for name, is_given in (
            ("-o -", typed.output == STDIN),
            ("a model from standard input", typed.model == STDIN),
            ("a model at a URL", URL.match(typed.model)),
            ("--in-place", typed.in_place),
            ("--dry-run", typed.dry_run),
        ):
            if is_given:
                raise UsageError(
                    f"--depfile and --if-changed cannot be used with {name}: they need an input file and an output file"
                )
        if not typed.output:
            raise UsageError("no output is given: add -o OUT")
        written = tuple(path for path in (typed.manifest, typed.card, html) if path is not None)
        options, output = dict(params), Path(typed.output)
        if typed.recipe is not None:
            options |= depfiles.options_of_recipe(typed.recipe, is_trusted=typed.trust)
        files = depfiles.files_of(options)
        return cls(command, dict(params), options, output, files, written, digests(files, output))

    def check(self, depfile: Path | None, *, has_stamp: bool) -> None:
        """Reject a depfile or a stamp that cannot be written, before any work begins."""
        if depfile is not None:
            depfiles.check(depfile, self.output, (*self.files, self.output, *self.side_outputs))
            for path in (self.output, *self.files, *depfiles.folders_of(self.options)):
                depfiles.make_escaped(str(path))
        if not has_stamp:
            return
        check_stamp(self.output)
        for name in depfiles.CALLABLE_OPTIONS:
            if self.options.get(name) and depfiles.is_callable_spec(self.options[name]):
                raise UsageError(
                    f"--if-changed cannot tell whether the data of {self.options[name]} changed",
                    hint="save its examples to a file, or leave out --if-changed",
                )

    def stamp(self, code: Mapping[str, str]) -> Stamp:
        """The stamp of the output as it is now, with the digests of the user's modules."""
        options = {name: _as_json(value) for name, value in self.params.items() if name not in _NOT_STAMPED}
        written = digests(self.all_outputs(), self.output)
        return Stamp(__version__, self.command, options, self.digests, code, written)

    def restamped(self, old: Stamp) -> Stamp:
        """The stamp that the output would have now with the modules of an older stamp."""
        return self.stamp(rehash(old.code, self.output))

    def all_outputs(self) -> tuple[Path, ...]:
        """The existing files of the output, and the side outputs."""
        return (*output_files(self.output), *self.side_outputs, *_generated_class(self.output, self.options))

    def output_paths(self) -> tuple[Path, ...]:
        """The paths of the output's files, provided that the format of the model stays the same."""
        if self.command == "export":
            return ()
        return planned_files(open_model(Path(self.options["model"])), self.output)

    def track_imports(self) -> Callable[[], tuple[Path, ...]]:
        """Begin to watch imports; the returned function lists the user's modules that were imported since."""
        before, began_ns = set(sys.modules), time.time_ns()
        # A module that an option names as a file is among the files of the options already.
        known = {path.resolve() for path in self.files}

        def imported() -> tuple[Path, ...]:
            modules = depfiles.user_modules(before, self.options, began_ns)
            return tuple(path for path in modules if path.resolve() not in known)

        return imported

    def write_files(self, depfile: Path | None, imported: Iterable[Path], *, has_stamp: bool) -> tuple[str, ...]:
        """Write the depfile and the stamp, where they are wanted; return notes on what could not be written.

        A failure is not an error: the output is complete, and without them it is merely built again next time.
        """
        if not is_rank_zero():
            return ()
        code = tuple(imported)
        notes = []
        if depfile is not None:
            error = attempt(lambda path: self.write_depfile(path, code), depfile)
            notes += _not_written(depfile, "make does not know the dependencies", error)
        if has_stamp:
            error = attempt(lambda output: self.write_stamp(output, code), self.output)
            consequence = f"the next run needs --force to replace {self.output}"
            notes += _not_written(stamp_path(self.output), consequence, error)
        return tuple(notes)

    def write_depfile(self, depfile: Path, imported: Iterable[Path]) -> None:
        """Write the rule for make, with the model as its first prerequisite."""
        main, *more = map(str, self.files)
        folders = map(str, depfiles.folders_of(self.options))
        names = dict.fromkeys([main, *more, *folders, *map(os.path.relpath, imported)])
        depfiles.write(depfile, self.output, depfiles.make_rule(str(self.output), names, main=main))

    def write_stamp(self, output: Path, imported: Iterable[Path]) -> None:
        """Write the stamp beside the output."""
        write_stamp(output, self.stamp(digests(imported, output)))


def _not_written(path: Path, consequence: str, error: PrunectlError | None) -> list[str]:
    if error is None:
        return []
    return [f"{path} could not be written, so {consequence}: {error.message.removesuffix('; nothing was written')}"]


def is_rank_zero() -> bool:
    """Whether this process writes the output, of several that train one model."""
    return os.environ.get("RANK", "0") == "0"


def _generated_class(output: Path, options: Mapping[str, Any]) -> tuple[Path, ...]:
    """The Python file with the class of exported PyTorch weights, where one is written."""
    if not options.get("code") and options.get("pattern") != CHANNEL:
        return ()
    path = code_beside(output)
    return (path,) if path.is_file() else ()


def _as_json(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_as_json(part) for part in value]
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def check_unmodified(step: BuildStep, old: Stamp, folder: Path | None = None) -> None:
    """Refuse to replace a file of the output, or beside it, that prunectl did not write or that has changed since.

    With a folder, only files in it are checked.
    """
    known = stamped_paths(old.written, step.output)
    inputs = {path.resolve() for path in step.files}
    for path in (*step.all_outputs(), *step.output_paths(), *known):
        if not os.path.lexists(path) or path.resolve() in inputs:
            continue
        if folder is not None and not path.absolute().is_relative_to(folder.absolute()):
            continue
        ((name, digest),) = digests([path], step.output).items()
        if digest != old.written.get(name):
            is_known = name in old.written
            problem = "has changed since prunectl wrote it" if is_known else f"was not written with {step.output}"
            raise UsageError(f"{path} {problem}", hint="choose another --output, or replace it with --force")


SCHEMA = "prunectl.stamp/1"
Digests = Mapping[str, str]
"""SHA-256 by the path relative to the folder of the output."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """Everything that determined the bytes of an output."""

    version: str
    command: str
    asked: Mapping[str, Any]
    """The options, without those that name the output."""
    read: Digests
    code: Digests
    """Digests of the user's modules that were imported."""
    written: Digests


def stamp_path(output: Path) -> Path:
    """The path of the stamp of an output."""
    return output.parent / f".{output.name}.prunectl"


def read_stamp(output: Path) -> Stamp | None:
    """The stamp of an output; None if there is none, or one that cannot be parsed."""
    try:
        fields = json.loads(stamp_path(output).read_bytes())
        if fields.pop("schema") != SCHEMA:
            return None
        stamp = Stamp(**fields)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    parts = (stamp.asked, stamp.read, stamp.code, stamp.written)
    return stamp if all(isinstance(part, dict) for part in parts) else None


def write_stamp(output: Path, stamp: Stamp) -> None:
    """Write a stamp beside its output, atomically."""
    text = json.dumps({"schema": SCHEMA, **asdict(stamp)}, indent=2, sort_keys=True) + "\n"
    atomic.write_text(stamp_path(output), text, is_forced=True)


def check_stamp(output: Path) -> None:
    """Reject an output whose stamp cannot be written, because another file has its name."""
    path = stamp_path(output)
    if os.path.lexists(path) and not path.is_file():
        raise UsageError(f"{path} is not a file, and the stamp of {output} has to be written there", hint="remove it")


def digests(files: Iterable[Path], output: Path) -> dict[str, str]:
    """SHA-256 of files by their names in a stamp; an empty string for a missing file."""
    return {stamped_name(path, output): _digest(path) for path in files}


def rehash(known: Digests, output: Path) -> dict[str, str]:
    """Hash the files of a stamp again, as they are now."""
    return {name: _digest(path) for name, path in zip(known, stamped_paths(known, output), strict=True)}


def _digest(path: Path) -> str:
    return sizes.sha256_of(path) if path.is_file() else ""


def stamped_name(path: Path, output: Path) -> str:
    """A path relative to the folder of the output, whose symbolic links are resolved so that `..` means its parent."""
    return os.path.relpath(os.path.join(os.path.realpath(path.parent), path.name), os.path.realpath(output.parent))


def stamped_paths(known: Iterable[str], output: Path) -> tuple[Path, ...]:
    """The paths of a stamp's files, relative if the output is, else absolute."""
    absolute = [os.path.normpath(os.path.join(os.path.realpath(output.parent), name)) for name in known]
    return tuple(Path(path if output.is_absolute() else os.path.relpath(path)) for path in absolute)


def output_files(output: Path) -> tuple[Path, ...]:
    """All files that an output consists of."""
    if output.is_dir():
        return tuple(sorted(path for path in output.rglob("*") if path.is_file()))
    model = attempt(open_model, output)
    # Weights alone (.npz) are one file.
    return (output,) if isinstance(model, PrunectlError) else model.files


def first_difference(old: Stamp, new: Stamp, option_name: Callable[[str], str]) -> str:
    """Why an output is out of date, with options as they are typed; empty if it is up to date."""
    if old.version != new.version:
        return f"it was written by prunectl {old.version}"
    if old.command != new.command:
        return f"it was written by prunectl {old.command}"
    changed = [name for name in {**old.asked, **new.asked} if old.asked.get(name) != new.asked.get(name)]
    if changed:
        return f"{option_name(min(changed))} has changed"
    for before, after in ((old.read, new.read), (old.code, new.code), (old.written, new.written)):
        for name in sorted({**before, **after}):
            if before.get(name) != after.get(name):
                return f"{name} {'has changed' if after.get(name) else 'is missing'}"
    return ""
