"""`--depfile` and `--if-changed`: what makes a command fit into a build."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from prunectl.commands import if_changed_stamp
from prunectl.commands.if_changed_leaving import Leaving, leave
from prunectl.commands.if_changed_making import Making, check
from prunectl.commands.if_changed_own import check_own
from prunectl.commands.options import panel, spelled
from prunectl.commands.verb import Verb, lent
from prunectl.formats import outputs
from prunectl.pruning import manifest
from prunectl.reporting.report import Artifact, Report
from prunectl.reporting.reporter import Reporter
from prunectl.reporting.table import Table

_build = panel("In a build")


class Maker(Verb):
    """A command that makes one output of files, and can say of which, and whether it still is what they give."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._own = lent(_options).params
        self.params.extend(self._own)

    def work(self, ctx: Any) -> Any:
        """Do the work, unless the output is what it would give."""
        word, if_changed = (ctx.params.pop(option.name) for option in self._own)
        depfile = Path(word) if word is not None else None
        _check_manifest(ctx.params)
        if depfile is None and not if_changed:
            return super().work(ctx)
        reporter: Reporter = ctx.obj
        making = Making.of(str(self.name), ctx.params, reporter.html)
        check(making, depfile, has_stamp=if_changed)
        old = if_changed_stamp.read(making.output) if if_changed else None
        guard: AbstractContextManager[None] = nullcontext()
        if old is not None:
            new = making.stamp(if_changed_stamp.again(old.code, making.output))
            reason = if_changed_stamp.difference(old, new, partial(spelled, ctx))
            if not reason:
                said = leave(making, depfile, if_changed_stamp.paths(old.code, making.output), has_stamp=False)
                return dataclasses.replace(reporter, html=None).show(_up_to_date(making.output, said))
            if not ctx.params["force"]:
                check_own(making, old)
                # All that is there is what this command wrote: nothing of anybody else's is replaced.
                ctx.params["force"] = True
                # So it still has to be when the work is done.
                guard = outputs.guarded(partial(check_own, making, old))
            reporter.note(f"{making.output} is made again: {reason}")
        imported = making.watch()
        ctx.obj = Leaving(
            reporter.settings,
            reporter.command,
            reporter.html,
            lambda: leave(making, depfile, imported(), has_stamp=if_changed),
        )
        with guard:
            return super().work(ctx)


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
    nbytes = sum(path.stat().st_size for path in if_changed_stamp.files_of(output))
    return Report(
        models=(),
        main=Table("", (), ()),
        artifacts=(Artifact(str(output), nbytes),),
        remarks=(f"{output} is up to date.", *said),
        bare=(),
        more={"up_to_date": True},
    )
