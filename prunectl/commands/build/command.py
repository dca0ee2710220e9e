"""`--depfile` and `--if-changed`: what makes a command fit into a build."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from prunectl.commands._command import BaseCommand, option_group, option_name, options_from_signature
from prunectl.commands.build import stamp
from prunectl.commands.build.stamp import BuildStep, check_build, check_unmodified
from prunectl.errors import PrunectlError, attempt
from prunectl.formats import atomic
from prunectl.pruning import manifest
from prunectl.reporting.report import Artifact, Report, Table
from prunectl.reporting.reporter import Reporter


@dataclass(frozen=True)
class BuildReporter(Reporter):
    """Shows what a command made when all that comes with it is there, and says what could not be written."""

    leave: Callable[[], tuple[str, ...]] = tuple

    def show(self, report: Report) -> int:
        """Print what a command found, and return its exit code."""
        # The page is among what the stamp knows.
        if self.html is not None:
            report = self._with_html_page(report, self.html)
        if report.exit_code == 0:
            report = replace(report, notes=(*report.notes, *self.leave()))
        return Reporter(self.settings, self.command).show(report)


def write_build_files(
    making: BuildStep, depfile: Path | None, imported: Iterable[Path], *, has_stamp: bool
) -> tuple[str, ...]:
    """Write the fragment and the stamp, where they are wanted; return in words what was not written.

    The output is there by now, and whole: without them no more is lost than that it is made again.
    """
    code = tuple(imported)
    wanted: list[tuple[Path, Callable[[Path], None], str]] = []
    if depfile is not None:
        wanted.append((depfile, lambda path: making.leave_fragment(path, code), "make does not know what was read"))
    if has_stamp:
        place = stamp.stamp_path(making.output)
        so = f"the next run needs --force to replace {making.output}"
        wanted.append((place, lambda _: making.leave_stamp(code), so))
    said = []
    for place, write, so in wanted if is_rank_zero() else ():
        failed = attempt(write, place)
        if isinstance(failed, PrunectlError):
            said.append(
                f"{place} could not be written, and {so}: {failed.message.removesuffix('; nothing was written')}"
            )
    return tuple(said)


def is_rank_zero() -> bool:
    """Whether this process writes, of several that train one model."""
    return os.environ.get("RANK", "0") == "0"


_build = option_group("In a build")


class BuildCommand(BaseCommand):
    """A command that makes one output of files, and can say of which, and whether it still is what they give."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._own = options_from_signature(_options).params
        self.params.extend(self._own)

    def run(self, ctx: Any) -> Any:
        """Do the work, unless the output is what it would give."""
        word, if_changed = (ctx.params.pop(option.name) for option in self._own)
        depfile = Path(word) if word is not None else None
        _check_manifest(ctx.params)
        if depfile is None and not if_changed:
            return super().run(ctx)
        reporter: Reporter = ctx.obj
        making = BuildStep.of(str(self.name), ctx.params, reporter.html)
        check_build(making, depfile, has_stamp=if_changed)
        old = stamp.read(making.output) if if_changed else None
        guard: AbstractContextManager[None] = nullcontext()
        if old is not None:
            new = making.stamp(stamp.rehash(old.code, making.output))
            reason = stamp.first_difference(old, new, partial(option_name, ctx))
            if not reason:
                said = write_build_files(making, depfile, stamp.paths(old.code, making.output), has_stamp=False)
                return dataclasses.replace(reporter, html=None).show(_up_to_date(making.output, said))
            if not ctx.params["force"]:
                check_unmodified(making, old)
                # All that is there is what this command wrote: nothing of anybody else's is replaced.
                ctx.params["force"] = True
                # So it still has to be when the work is done.
                guard = atomic.guarded(partial(check_unmodified, making, old))
            reporter.note(f"{making.output} is made again: {reason}")
        imported = making.watch()
        ctx.obj = BuildReporter(
            reporter.settings,
            reporter.command,
            reporter.html,
            lambda: write_build_files(making, depfile, imported(), has_stamp=if_changed),
        )
        with guard:
            return super().run(ctx)


def _check_manifest(said: Mapping[str, Any]) -> None:
    if said.get("manifest") is not None and not said.get("dry_run"):
        taken = [Path(said[name]) for name in ("model", "output") if said[name]]
        manifest.check(Path(said["manifest"]), taken, is_forced=said["force"])


def _options(
    *,
    depfile: Annotated[Path | None, _build(metavar="FILE", help="Write for make which files were read.")] = None,
    if_changed: Annotated[bool, _build("--if-changed", help="Do nothing where the output is up to date.")] = False,
) -> None:
    """Lend a signature to options."""


def _up_to_date(output: Path, said: tuple[str, ...]) -> Report:
    nbytes = sum(path.stat().st_size for path in stamp.files_of(output))
    return Report(
        models=(),
        table=Table("", (), ()),
        artifacts=(Artifact(str(output), nbytes),),
        notes=(f"{output} is up to date.", *said),
        quiet_lines=(),
        extra_json={"up_to_date": True},
    )
