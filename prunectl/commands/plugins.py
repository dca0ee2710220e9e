"""`prunectl plugins`: what is there to choose from?"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from prunectl.commands._command import make_command
from prunectl.errors import UsageError
from prunectl.formats import atomic
from prunectl.pruning.choices import Choice, choices
from prunectl.reporting.plots import braille_plot, schedule_curves, schedules_svg
from prunectl.reporting.report import Artifact, Column, Report, Section, Table
from prunectl.reporting.reporter import Reporter

_COLUMNS = (
    Column("kind"),
    Column("name"),
    Column("from", is_optional=True, title="source"),
    Column("what", title="description"),
)
_LETTERS, _LINES = 48, 5


def plugins_report(plugins: Sequence[Choice], curves: Mapping[str, Sequence[float]], picture: Path | None) -> Report:
    """The list of plug-ins, with plots of schedules if there are any."""
    rows = tuple((plugin.kind, plugin.name, plugin.source, plugin.summary) for plugin in plugins)
    main = Table("plugins", _COLUMNS, rows)
    drawn = tuple(Section(name, drawing=tuple(_framed(curve))) for name, curve in curves.items())
    sections = (Section("", (), (main,)), *drawn) if drawn else ()
    return Report(
        models=(),
        table=main,
        sections=sections,
        artifacts=(Artifact(str(picture), picture.stat().st_size),) if picture is not None else (),
        notes=(f"The schedules were drawn in {picture}.",) if picture is not None else (),
        quiet_lines=tuple(plugin.name for plugin in plugins),
        extra_json={"plugins": [dict(zip(("kind", "name", "from", "what"), row, strict=True)) for row in rows]},
    )


def _framed(curve: Sequence[float]) -> list[str]:
    scale = ["100 %", *([""] * (_LINES - 2)), "  0 %"]
    return [f"{left:>5} {line}" for left, line in zip(scale, braille_plot(curve, _LETTERS, _LINES), strict=True)]


class PluginKind(StrEnum):
    """Kinds of things that have names."""

    STRATEGIES = "strategies"
    SCHEDULES = "schedules"
    POLICIES = "policies"
    FORMATS = "formats"
    CHANNELS = "channels"


def plugins(
    ctx: typer.Context,
    kind: Annotated[
        PluginKind | None, typer.Argument(metavar="[KIND]", help=f"Kind to list: {', '.join(PluginKind)}.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Argument(metavar="FILE.svg", help="SVG file to draw the schedules to, with --plot.")
    ] = None,
    *,
    plot: Annotated[bool, typer.Option("--plot", help="Draw the schedules as curves.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing SVG file.")] = False,
) -> int:
    """List strategies, schedules, policies, formats and channel measures, built in or installed.

    [dim]$[/] prunectl plugins strategies

    [dim]$[/] prunectl plugins schedules --plot

    [dim]$[/] prunectl plugins schedules --plot curves.svg
    """
    reporter: Reporter = ctx.obj
    if plot and kind not in {None, PluginKind.SCHEDULES}:
        raise UsageError("only schedules can be plotted", hint="prunectl plugins schedules --plot")
    if picture is not None and not plot:
        raise UsageError(
            f"{picture} is named, but --plot is not given", hint="write prunectl plugins schedules --plot FILE.svg"
        )
    if picture is not None:
        atomic.write_text(picture, schedules_svg(), is_forced=force)
    listed = choices(str(kind) if kind is not None else "schedules" if plot else "")
    if kind is PluginKind.CHANNELS or (kind is None and not plot):
        listed = (*listed, *importlib.import_module("prunectl.channels.config").list_importances())
    return reporter.show(plugins_report(listed, schedule_curves() if plot and picture is None else {}, picture))


command = make_command(plugins)
