"""`prunectl init`: budgets for what is there."""

from __future__ import annotations

import os
import shlex
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from prunectl.analysis.tensor_io import Items, ProgressFactory, no_progress
from prunectl.checks import baseline as baselines
from prunectl.checks.baseline import Baseline
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


def init_report(path: Path, baseline: Path | None, proposals: list[Proposal], failures: list[Failure]) -> Report:
    """The report on the file of budgets that was written, and on the baseline unless one existed."""
    rows = tuple(
        (proposal.path, proposal.max_raw, proposal.max_gzip, proposal.max_params, proposal.min_sparsity)
        for proposal in proposals
    )
    table = Table("budgets", _COLUMNS, rows)
    written = [path, *([] if baseline is None else [baseline])]
    models = f"{len(proposals)} {'model' if len(proposals) == 1 else 'models'}"
    is_near = path.parent == Path()
    next_command = "prunectl check" if is_near else shlex.join(["prunectl", "check", "--config", str(path)])
    kept = () if baseline is not None else (f"{path.with_name(BASELINE)} was there before, and is unchanged.",)
    title = f"Wrote {' and '.join(map(str, written))}: {models}"
    return Report(
        models=(),
        table=table,
        sections=(Section(title, tables=(table,), notes=kept),),
        summary=title,
        next_step=next_command,
        failures=tuple(failures),
        artifacts=tuple(Artifact(str(file), file.stat().st_size) for file in written),
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
    """Measure all models in a folder, and write a prunectl.toml with limits for them and a baseline of their sizes.

    Searches subfolders too, except hidden ones. An existing prunectl.toml or prunectl-baseline.json is never
    overwritten.

    [dim]$[/] prunectl init

    [dim]$[/] prunectl check
    """
    reporter: Reporter = ctx.obj
    return reporter.show(init_report(*write_budgets(folder, parse_ratio(margin), reporter.progress)))


def write_budgets(
    folder: Path, room: float, meter: ProgressFactory = no_progress
) -> tuple[Path, Path | None, list[Proposal], list[Failure]]:
    """Write limits for all models of a folder, with room above their sizes, and a baseline unless there is one.

    Returns both files, the limits, and what failed.
    """
    target = folder / OWN
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder", hint="name the folder of the models: prunectl init FOLDER")
    if target.exists():
        raise UsageError(f"{target} exists", hint="edit it, or remove it first")
    if (folder / SHARED).is_file() and load_config(folder / SHARED).table:
        raise UsageError(f"{folder / SHARED} already has budgets", hint="edit them there")
    proposals, failures = _proposals(folder, room, meter)
    if not proposals:
        raise UsageError(f"no model was found in {folder}", hint="name the folder of the models: prunectl init FOLDER")
    atomic.write_text(target, as_toml(proposals, BASELINE), is_forced=False)
    return target, _write_baseline(folder / BASELINE, proposals), proposals, failures


def _write_baseline(path: Path, proposals: list[Proposal]) -> Path | None:
    """Write a baseline of the models; None if there is one already, which is not changed."""
    if os.path.lexists(path):
        return None
    entries = {proposal.key: proposal.entry for proposal in proposals}
    baselines.write(Baseline(str(path), {}, path), entries, is_forced=False)
    return path


def _proposals(folder: Path, room: float, meter: ProgressFactory) -> tuple[list[Proposal], list[Failure]]:
    proposals, failures = [], []
    paths = list(discover_models(folder))
    with meter("measuring models", Items(len(paths))) as bar:
        for path in paths:
            proposal = attempt(partial(_proposal, folder=folder, room=room), path)
            if isinstance(proposal, PrunectlError):
                failures.append(Failure(str(path), proposal))
            else:
                proposals.append(proposal)
            bar.advance(1)
    return proposals, failures


def _proposal(path: Path, folder: Path, room: float) -> Proposal:
    return propose(LazyModelStats(open_model(path), str(path)), path.relative_to(folder).as_posix(), room)


command = make_command(init)
