"""`prunectl plugins`: what is there to choose from?"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from prunectl.channels.named import measures
from prunectl.commands.verb import verb
from prunectl.errors import UsageError
from prunectl.formats import outputs
from prunectl.reporting.plugins_report import plugins_report
from prunectl.reporting.reporter import Reporter
from prunectl.reporting.schedule_plot import curves, svg
from prunectl.training.choices import choices


class Kind(StrEnum):
    """Kinds of things that have names."""

    STRATEGIES = "strategies"
    SCHEDULES = "schedules"
    POLICIES = "policies"
    FORMATS = "formats"
    CHANNELS = "channels"


def plugins(
    ctx: typer.Context,
    kind: Annotated[Kind | None, typer.Argument(metavar="[KIND]", help=f"One of {', '.join(Kind)}.")] = None,
    picture: Annotated[Path | None, typer.Argument(metavar="FILE.svg", help="Where --plot draws to.")] = None,
    *,
    plot: Annotated[bool, typer.Option("--plot", help="Draw the curves of schedules.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a picture that exists.")] = False,
) -> int:
    """List strategies, schedules, policies, formats and measures of channels: built in, and installed by others.

    [dim]$[/] prunectl plugins strategies

    [dim]$[/] prunectl plugins schedules --plot

    [dim]$[/] prunectl plugins schedules --plot curves.svg
    """
    reporter: Reporter = ctx.obj
    if plot and kind not in {None, Kind.SCHEDULES}:
        raise UsageError("only schedules have curves", hint="prunectl plugins schedules --plot")
    if picture is not None and not plot:
        raise UsageError(f"what is {picture} for?", hint="prunectl plugins schedules --plot FILE.svg")
    if picture is not None:
        outputs.write_text(picture, svg(), is_forced=force)
    found = choices(str(kind) if kind is not None else "schedules" if plot else "")
    if kind is Kind.CHANNELS or (kind is None and not plot):
        found = (*found, *measures())
    return reporter.show(plugins_report(found, curves() if plot and picture is None else {}, picture))


command = verb(plugins)
