"""`prunectl check`: do the models keep to their budgets?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunectl.commands.check_requests import baseline_of, budgets_of, shown
from prunectl.commands.reports import Reports
from prunectl.commands.verb import verb
from prunectl.gating.check import check as run
from prunectl.reporting.gates.table import FORMATS
from prunectl.reporting.reporter import Reporter


def check(
    ctx: typer.Context,
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME...]", help="Budgets; else all of them.")] = None,
    *,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The budgets; else the nearest prunectl.toml or pyproject.toml.")
    ] = None,
    report: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FORMAT:PATH",
            help=f"Also write {', '.join(FORMATS)}; - is standard output.",
        ),
    ] = None,
    baseline: Annotated[
        str, typer.Option(metavar="FILE|git:REF", help="What models were; else as the budgets say.")
    ] = "",
    update_baseline: Annotated[
        bool, typer.Option("--update-baseline", help="Take what models are now for their baseline.")
    ] = False,
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Why; kept in the baseline.")] = "",
    trust: Annotated[
        bool, typer.Option("--trust", help="Let code run that the budgets name, or that comes with a model.")
    ] = False,
) -> int:
    r"""Hold models against their budgets: size, growth, sparsity, zeros that must stay zero.

    Budgets stand in prunectl.toml, or under \[tool.prunectl] in pyproject.toml. A limit that says no is exit code 1;
    one that only warns is not.

    [dim]$[/] prunectl init

    [dim]$[/] prunectl check

    [dim]$[/] prunectl check --report junit:check.xml --report markdown:-

    [dim]$[/] prunectl check --update-baseline --reason 'the new head'
    """
    reporter: Reporter = ctx.obj
    reports = Reports.of(report or [], is_json=reporter.is_json)
    budgets = budgets_of(config)
    earlier = baseline_of(budgets, baseline, is_new=update_baseline, reason=reason)
    reports.spare(budgets.path, earlier.path)
    file, bar = shown(budgets.path), reporter.progress
    found = run(budgets, names or [], earlier, file=file, reason=reason, is_trusted=trust, meter=bar)
    return reports.show(found, reporter)


command = verb(check)
