"""`prunectl init`: budgets for what is there."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from prunectl.checks.config import OWN, SHARED, load_config
from prunectl.checks.lazy_stats import LazyModelStats
from prunectl.checks.parse import BASELINE
from prunectl.checks.suggest import Proposal, as_toml, discover_models, propose
from prunectl.commands._command import make_command
from prunectl.errors import PrunectlError, UsageError, attempt
from prunectl.formats import atomic
from prunectl.formats.registry import open_model
from prunectl.reporting.report import Artifact, Column, Failure, Report, Section, Table, Unit
from prunectl.reporting.reporter import Reporter
from prunectl.units import parse_ratio

_COLUMNS = (
    Column("model"),
    Column("max-raw", Unit.BYTES),
    Column("max-gzip", Unit.BYTES),
    Column("max-params", Unit.COUNT),
    Column("min-sparsity", Unit.RATIO),
)


def init_report(path: Path, proposals: list[Proposal], failures: list[Failure]) -> Report:
    """The report on a file of budgets that was written."""
    rows = tuple(
        (proposal.path, proposal.max_raw, proposal.max_gzip, proposal.max_params, proposal.min_sparsity)
        for proposal in proposals
    )
    table = Table("budgets", _COLUMNS, rows)
    return Report(
        models=(),
        table=table,
        sections=(Section(str(path), tables=(table,), notes=("Next: prunectl check",)),),
        failures=tuple(failures),
        artifacts=(Artifact(str(path), path.stat().st_size),),
        quiet_lines=(),
    )


def init(
    ctx: typer.Context,
    folder: Annotated[
        Path, typer.Argument(metavar="[FOLDER]", help="Folder with the models; prunectl.toml is written there.")
    ] = Path(),
    *,
    margin: Annotated[str, typer.Option(metavar="RATIO", help="Headroom above the current size, e.g. 20%.")] = "10%",
) -> int:
    """Measure all models in a folder, and write a prunectl.toml with limits for them.

    Searches subfolders too, except hidden ones. An existing prunectl.toml is never overwritten.

    [dim]$[/] prunectl init

    [dim]$[/] prunectl check
    """
    reporter: Reporter = ctx.obj
    return reporter.show(init_report(*write_budgets(folder, parse_ratio(margin))))


def write_budgets(folder: Path, room: float) -> tuple[Path, list[Proposal], list[Failure]]:
    """Write limits for all models of a folder, with room above their sizes; return the file, them, and what failed."""
    target = folder / OWN
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder", hint="name the folder of the models: prunectl init FOLDER")
    if target.exists():
        raise UsageError(f"{target} exists", hint="edit it, or remove it first")
    if (folder / SHARED).is_file() and load_config(folder / SHARED).table:
        raise UsageError(f"{folder / SHARED} already has budgets", hint="edit them there")
    proposals, failures = _proposals(folder, room)
    if not proposals:
        raise UsageError(f"no model was found in {folder}", hint="name the folder of the models: prunectl init FOLDER")
    atomic.write_text(target, as_toml(proposals, BASELINE), is_forced=False)
    return target, proposals, failures


def _proposals(folder: Path, room: float) -> tuple[list[Proposal], list[Failure]]:
    proposals, failures = [], []
    for path in discover_models(folder):
        proposal = attempt(partial(_proposal, folder=folder, room=room), path)
        if isinstance(proposal, PrunectlError):
            failures.append(Failure(str(path), proposal))
        else:
            proposals.append(proposal)
    return proposals, failures


def _proposal(path: Path, folder: Path, room: float) -> Proposal:
    return propose(LazyModelStats(open_model(path), str(path)), path.relative_to(folder).as_posix(), room)


command = make_command(init)
