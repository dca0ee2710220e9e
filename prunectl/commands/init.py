"""`prunectl init`: budgets for what is there."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from prunectl.commands.verb import verb
from prunectl.errors import PrunectlError, UsageError, attempt
from prunectl.formats import outputs
from prunectl.formats.table import open_model
from prunectl.gating.find import OWN, SHARED, opened
from prunectl.gating.found import models
from prunectl.gating.measured import Measured
from prunectl.gating.propose import Proposal, as_toml, propose
from prunectl.gating.read import BASELINE
from prunectl.reporting.init_report import init_report
from prunectl.reporting.report import Failure
from prunectl.reporting.reporter import Reporter
from prunectl.units import parse_ratio


def init(
    ctx: typer.Context,
    folder: Annotated[
        Path, typer.Argument(metavar="[FOLDER]", help="Where the models are, and the file goes.")
    ] = Path(),
    *,
    margin: Annotated[str, typer.Option(metavar="RATIO", help="How much bigger models may become.")] = "10%",
) -> int:
    """Measure the models in a folder and below it, and write prunectl.toml with limits a little above.

    A file that is there is left alone.

    [dim]$[/] prunectl init

    [dim]$[/] prunectl check
    """
    reporter: Reporter = ctx.obj
    room, target = parse_ratio(margin), folder / OWN
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder", hint="prunectl init, where the models are")
    if target.exists():
        raise UsageError(f"{target} exists", hint="change it, or remove it first")
    if (folder / SHARED).is_file() and opened(folder / SHARED).table:
        raise UsageError(f"{folder / SHARED} has budgets already", hint="change them there")
    proposals, failures = _proposals(folder, room)
    if not proposals:
        raise UsageError(f"there is no model in {folder}", hint="prunectl init FOLDER")
    outputs.write_text(target, as_toml(proposals, BASELINE), is_forced=False)
    return reporter.show(init_report(target, proposals, failures))


def _proposals(folder: Path, room: float) -> tuple[list[Proposal], list[Failure]]:
    proposals, failures = [], []
    for path in models(folder):
        found = attempt(partial(_proposal, folder=folder, room=room), path)
        if isinstance(found, PrunectlError):
            failures.append(Failure(str(path), found))
        else:
            proposals.append(found)
    return proposals, failures


def _proposal(path: Path, folder: Path, room: float) -> Proposal:
    return propose(Measured(open_model(path), str(path)), path.relative_to(folder).as_posix(), room)


command = verb(init)
