"""`--depfile` and `--if-changed`: what makes a command fit into a build."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from prunectl import __version__
from prunectl.analysis.patterns import CHANNEL
from prunectl.commands._command import STDIN, BaseCommand, add_options, option_group, option_name
from prunectl.commands._requests import OutputOptions
from prunectl.commands.build import depfile as depfiles
from prunectl.commands.build import stamp as stamps
from prunectl.commands.build.stamp import Stamp
from prunectl.errors import PrunectlError, UsageError, attempt
from prunectl.formats import atomic
from prunectl.formats.registry import open_model
from prunectl.pruning.destination import code_beside
from prunectl.pruning.request import check_manifest
from prunectl.reporting.report import Artifact, Report, Table
from prunectl.reporting.reporter import Reporter

_build = option_group("In a build")


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """The options about builds."""

    depfile: Annotated[Path | None, _build(metavar="FILE", help="Write for make which files were read.")] = None
    if_changed: Annotated[bool, _build("--if-changed", help="Do nothing where the output is up to date.")] = False


class BuildCommand(BaseCommand):
    """A command that makes one output of files, and can say of which, and whether it still is what they give."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._take_build = add_options(self, BuildOptions)

    def run(self, ctx: Any) -> Any:
        """Run the command, unless its output is up to date; write the depfile and the stamp when it has succeeded."""
        build: BuildOptions = self._take_build(ctx)
        depfile, if_changed = build.depfile, build.if_changed
        options = super().run(ctx)
        _check_manifest(options)
        if depfile is None and not if_changed:
            return options.run(ctx)
        reporter: Reporter = ctx.obj
        step = BuildStep.of(str(self.name), options, ctx.params, reporter.html)
        step.check(depfile, has_stamp=if_changed)
        old = stamps.read(step.output) if if_changed else None
        guard: AbstractContextManager[None] = nullcontext()
        if old is not None:
            reason = stamps.first_difference(old, step.restamped(old), partial(option_name, ctx))
            if not reason:
                notes = step.write_files(depfile, stamps.paths(old.code, step.output), has_stamp=False)
                return replace(reporter, html=None).show(_up_to_date(step.output, notes))
            if not options.force:
                check_unmodified(step, old)
                # All that is there is what this command wrote: nothing of anybody else's is replaced.
                options = replace(options, force=True)
                # So it still has to be when the work is done.
                guard = atomic.guarded(partial(check_unmodified, step, old))
            reporter.note(f"{step.output} is made again: {reason}")
        imported = step.track_imports()
        ctx.obj = replace(reporter, on_success=lambda: step.write_files(depfile, imported(), has_stamp=if_changed))
        with guard:
            return options.run(ctx)


def _check_manifest(options: OutputOptions) -> None:
    if options.manifest is not None and not options.dry_run:
        models = [Path(name) for name in (options.model, options.output) if name]
        check_manifest(options.manifest, models, is_forced=options.force)


def _up_to_date(output: Path, notes: tuple[str, ...]) -> Report:
    nbytes = sum(path.stat().st_size for path in stamps.files_of(output))
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
    """The same, with those of a recipe."""
    output: Path
    files: tuple[Path, ...]
    side_outputs: tuple[Path, ...]
    """Files that are written with the output: a manifest, a page."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """Of the files, taken before any of them is read."""

    @classmethod
    def of(cls, command: str, typed: OutputOptions, params: Mapping[str, Any], html: Path | None) -> BuildStep:
        """Collect the files of a command, and reject what makes no file of files."""
        for name, is_given in (
            ("-o -", typed.output == STDIN),
            ("a model from standard input", typed.model == STDIN),
            ("--in-place", typed.in_place),
            ("--dry-run", typed.dry_run),
        ):
            if is_given:
                raise UsageError(
                    f"--depfile and --if-changed are about an output and the files that it is made of, not {name}"
                )
        if not typed.output:
            raise UsageError("where to? say --output")
        written = tuple(path for path in (typed.manifest, typed.card, html) if path is not None)
        options, output = dict(params), Path(typed.output)
        if typed.recipe is not None:
            options |= depfiles.options_of_recipe(typed.recipe, is_trusted=typed.trust)
        files = depfiles.files_of(options)
        return cls(command, dict(params), options, output, files, written, stamps.digests(files, output))

    def check(self, depfile: Path | None, *, has_stamp: bool) -> None:
        """Reject a depfile or a stamp that cannot be written, before any work begins."""
        if depfile is not None:
            depfiles.check(depfile, self.output, (*self.files, self.output, *self.side_outputs))
            for path in (self.output, *self.files, *depfiles.folders_of(self.options)):
                depfiles.make_escaped(str(path))
        if not has_stamp:
            return
        stamps.check(self.output)
        for name in depfiles.CALLABLE_OPTIONS:
            if self.options.get(name) and depfiles.is_callable_spec(self.options[name]):
                raise UsageError(
                    f"--if-changed cannot know what {self.options[name]} reads",
                    hint="save its examples to a file, or leave out --if-changed",
                )

    def stamp(self, code: Mapping[str, str]) -> Stamp:
        """The stamp of the output as it is now, with the digests of the user's modules."""
        options = {name: _as_json(value) for name, value in self.params.items() if name not in _NOT_STAMPED}
        written = stamps.digests(self.all_outputs(), self.output)
        return Stamp(__version__, self.command, options, self.digests, code, written)

    def restamped(self, old: Stamp) -> Stamp:
        """The stamp that the output would have now with the modules of an older one."""
        return self.stamp(stamps.rehash(old.code, self.output))

    def all_outputs(self) -> tuple[Path, ...]:
        """The files of the output that there are, and those beside it."""
        return (*stamps.files_of(self.output), *self.side_outputs, *_generated_class(self.output, self.options))

    def output_paths(self) -> tuple[Path, ...]:
        """Where the output will go, file by file, as far as the format of the model stays."""
        if self.command == "export":
            return ()
        targets = atomic.targets(open_model(Path(self.options["model"])), self.output).values()
        return tuple(self.output.parent / target for target in targets)

    def track_imports(self) -> Callable[[], tuple[Path, ...]]:
        """Begin to watch imports; the function that is returned lists the user's modules since."""
        before, began_ns = set(sys.modules), time.time_ns()
        # A file is among what options name, however it is imported.
        known = {path.resolve() for path in self.files}

        def imported() -> tuple[Path, ...]:
            modules = depfiles.user_modules(before, self.options, began_ns)
            return tuple(path for path in modules if path.resolve() not in known)

        return imported

    def write_files(self, depfile: Path | None, imported: Iterable[Path], *, has_stamp: bool) -> tuple[str, ...]:
        """Write the depfile and the stamp, where they are wanted; return notes on what could not be written.

        The output is there by now, and whole: without them no more is lost than that it is made again.
        """
        if not is_rank_zero():
            return ()
        code = tuple(imported)
        notes = []
        if depfile is not None:
            error = attempt(lambda path: self.write_depfile(path, code), depfile)
            notes += _not_written(depfile, "make does not know what was read", error)
        if has_stamp:
            error = attempt(lambda output: self.write_stamp(output, code), self.output)
            consequence = f"the next run needs --force to replace {self.output}"
            notes += _not_written(stamps.stamp_path(self.output), consequence, error)
        return tuple(notes)

    def write_depfile(self, depfile: Path, imported: Iterable[Path]) -> None:
        """Write the rule for make, with the model as its first prerequisite."""
        main, *more = map(str, self.files)
        folders = map(str, depfiles.folders_of(self.options))
        names = dict.fromkeys([main, *more, *folders, *map(os.path.relpath, imported)])
        depfiles.write(depfile, self.output, depfiles.make_rule(str(self.output), names, main=main))

    def write_stamp(self, output: Path, imported: Iterable[Path]) -> None:
        """Write the stamp beside the output."""
        stamps.write(output, self.stamp(stamps.digests(imported, output)))


def _not_written(path: Path, consequence: str, error: PrunectlError | None) -> list[str]:
    if error is None:
        return []
    return [f"{path} could not be written, and {consequence}: {error.message.removesuffix('; nothing was written')}"]


def is_rank_zero() -> bool:
    """Whether this process writes, of several that train one model."""
    return os.environ.get("RANK", "0") == "0"


def _generated_class(output: Path, options: Mapping[str, Any]) -> tuple[Path, ...]:
    """The Python file that comes with weights of PyTorch: its class, where one is written."""
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

    With a folder, only what lies in it is looked at.
    """
    known = stamps.paths(old.written, step.output)
    inputs = {path.resolve() for path in step.files}
    for path in (*step.all_outputs(), *step.output_paths(), *known):
        if not os.path.lexists(path) or path.resolve() in inputs:
            continue
        if folder is not None and not path.absolute().is_relative_to(folder.absolute()):
            continue
        ((name, digest),) = stamps.digests([path], step.output).items()
        if digest != old.written.get(name):
            is_known = name in old.written
            problem = "has changed since prunectl wrote it" if is_known else f"was not written with {step.output}"
            raise UsageError(f"{path} {problem}", hint="write elsewhere, or replace it with --force")
