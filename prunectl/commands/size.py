"""`prunectl size`: how big is it, really, and is that small enough?"""

from __future__ import annotations

import importlib
import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from prunectl.analysis import sizes
from prunectl.analysis.inspect import quantised_hint
from prunectl.analysis.sizes import Codec, CodecName, LimitCheck, SizeLimits, check_limits, growth_sentence, measure
from prunectl.analysis.stats import Estimate, ModelStats
from prunectl.analysis.tensor_io import Items, no_progress
from prunectl.commands._command import inspect_each, make_command
from prunectl.errors import UsageError, WorkError
from prunectl.formats.detect import URL
from prunectl.formats.registry import open_model
from prunectl.formats.workers import usable_cores
from prunectl.reporting.inspect import next_step
from prunectl.reporting.report import Cell, Column, Failure, Report, Table, Unit, survey_json
from prunectl.reporting.reporter import Reporter
from prunectl.units import nbytes, parse_ratio, parse_size


def size_report(
    models: Sequence[ModelStats],
    gates: Sequence[LimitCheck],
    failures: Sequence[Failure],
    codec: Codec,
    notes: Sequence[str] = (),
) -> Report:
    """The report on the sizes of some models."""
    columns = [
        Column("path"),
        Column("raw", Unit.BYTES),
        Column("packed", Unit.BYTES),
        Column(codec.name.value if codec.level else "stream", Unit.BYTES, title="" if codec.level else "uncompressed"),
        Column("sparsity", Unit.RATIO),
    ]
    if len(models) > 1:
        columns.append(Column("ratio", Unit.FACTOR, title="smaller than first"))
    first = models[0].bytes.compressed if models else None
    return Report(
        models=tuple({**survey_json(stats), "codec": asdict(codec)} for stats in models),
        table=Table("sizes", tuple(columns), tuple(_cells(stats, first)[: len(columns)] for stats in models)),
        gates=tuple(gates),
        failures=tuple(failures),
        notes=(
            *(f"{stats.path}: {sentence}" for stats in models for sentence in quantised_hint(stats)),
            *(f"{stats.path}: {_estimated(stats.estimate)}" for stats in models if stats.estimate is not None),
            *notes,
        ),
        next_step=_next_step(models) if models and not failures else "",
        quiet_lines=tuple(str(stats.bytes.compressed) for stats in models),
    )


def _estimated(estimate: Estimate) -> str:
    return (
        f"gzip is an estimate from {nbytes(estimate.sampled)}, off by at most {estimate.error:.1%} in 95 of 100 cases; "
        "packed and sparsity were not measured."
    )


def _unclear(stats: ModelStats, limit: int | None, reporter: Reporter) -> Failure | None:
    """A failure where an estimate is too close to the limit to judge it."""
    if limit is None or stats.estimate is None or stats.bytes.compressed is None:
        return None
    size, error = stats.bytes.compressed, stats.estimate.error
    if abs(size - limit) > error * size:
        return None
    between = " to ".join(nbytes(round(size * (1 + sign * error)), reporter.settings.units) for sign in (-1, 1))
    return Failure(
        stats.path,
        WorkError(
            f"{stats.path} cannot be judged: gzip is {between}, too near --max-gzip "
            f"{nbytes(limit, reporter.settings.units)}",
            hint="leave out --estimate to measure it exactly",
        ),
    )


def _next_step(models: Sequence[ModelStats]) -> str:
    """The next command: one that makes a single model smaller, or compares several."""
    if len(models) == 1:
        return next_step(models[0])
    return shlex.join(["prunectl", "diff", models[-1].path, models[0].path])


def _cells(stats: ModelStats, first: int | None) -> tuple[Cell, ...]:
    sizes = stats.bytes
    ratio = first / sizes.compressed if first is not None and sizes.compressed else None
    return (stats.path, sizes.raw, sizes.packed, sizes.compressed, stats.prunable_sparsity, ratio)


_LIMITS = "Limits (exit code 1 if a model exceeds one)"


def _limit(metavar: str, line: str, *names: str) -> Any:
    return typer.Option(*names, metavar=metavar, help=line, rich_help_panel=_LIMITS)


def size(
    ctx: typer.Context,
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="Model files or folders; - reads standard input.")
    ],
    *,
    max_raw: Annotated[str, _limit("SIZE", "Largest size on disk, e.g. 2MB.")] = "",
    max_packed: Annotated[str, _limit("SIZE", "Largest size after --pack, e.g. 1MB.")] = "",
    max_gzip: Annotated[
        str, _limit("SIZE", "Largest compressed size, e.g. 500KB (see --codec).", "--max-gzip", "--max-compressed")
    ] = "",
    min_sparsity: Annotated[str, _limit("RATIO", "Lowest sparsity of the prunable weights: 80%.")] = "",
    against: Annotated[str, _limit("FILE", "Earlier model to compare with, for --max-growth.")] = "",
    max_growth: Annotated[str, _limit("SIZE|%", "Largest growth in compressed size: 2% or 10KB.")] = "",
    codec: Annotated[CodecName, typer.Option(help="Compression to measure with.")] = CodecName.GZIP,
    level: Annotated[int | None, typer.Option(help="Compression level.  [default: gzip 6, zstd 3, xz 6]")] = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Estimate gzip of models above 32 MB to 1 %, in about a second.")
    ] = False,
) -> int:
    """Measure raw, packed and compressed size and sparsity, and check them against limits.

    raw is the size on disk, packed the size after --pack, gzip the size of a download: stock zlib at level 6, as in
    Python's gzip.compress(data, 6, mtime=0). A folder is measured as a sorted tar without times.

    [dim]$[/] prunectl size model.h5

    [dim]$[/] prunectl size small.h5 --max-gzip 2MB --min-sparsity 80%

    [dim]$[/] prunectl size small.h5 --against model.h5 --max-growth 0%
    """
    reporter: Reporter = ctx.obj
    compressor = sizes.get_codec(codec, level)
    if estimate:
        whole = {"--max-packed": max_packed, "--min-sparsity": min_sparsity, "--against": against}
        if codec is not CodecName.GZIP:
            raise UsageError(
                f"--estimate works with gzip only, not with {codec}", hint="leave out --estimate or --codec"
            )
        for option, value in whole.items():
            if value:
                raise UsageError(f"{option} needs every byte of the model", hint=f"leave out --estimate or {option}")
        if any(map(URL.match, paths)):
            # The sample is read at a thousand offsets: at a URL that would take a thousand requests.
            raise UsageError("--estimate needs a file, not a URL", hint="leave out --estimate, or download the model")
    if bool(against) != bool(max_growth):
        raise UsageError(
            "--against and --max-growth must be used together", hint="write --against old.h5 --max-growth 2%"
        )
    is_share = max_growth.endswith("%")
    limits = SizeLimits(
        max_raw=parse_size(max_raw) if max_raw else None,
        max_packed=parse_size(max_packed) if max_packed else None,
        max_compressed=parse_size(max_gzip) if max_gzip else None,
        min_sparsity=parse_ratio(min_sparsity) if min_sparsity else None,
        max_growth_ratio=parse_ratio(max_growth) if is_share else None,
        max_growth_bytes=parse_size(max_growth) if max_growth and not is_share else None,
        baseline=measure(open_model(Path(against)), compressor) if against else None,
        codec=codec,
    )
    look: Any = importlib.import_module("prunectl.analysis.estimate").estimate_size if estimate else measure
    jobs = min(len(paths), usable_cores())
    with reporter.progress("measuring models", Items(len(paths))) if jobs > 1 else nullcontext() as bar:
        # A terminal shows only one progress bar at a time.
        meter = no_progress if jobs > 1 else reporter.progress

        def measured(path: Path) -> ModelStats:
            try:
                stats: ModelStats = look(open_model(path), compressor, meter)
            finally:
                if bar is not None:
                    bar.advance(1)
            return stats

        models, failures = inspect_each(paths, measured, reporter.note, jobs=jobs)
    unclear = [failure for stats in models if (failure := _unclear(stats, limits.max_compressed, reporter)) is not None]
    failures += unclear
    unjudged = {failure.path for failure in unclear}
    checks = [gate for stats in models if stats.path not in unjudged for gate in check_limits(stats, limits)]
    grown = {check.model for check in checks if check.id == "max-growth" and not check.ok}
    earlier = {row.name: (row.bytes, row.zeros or 0) for row in limits.baseline.layers} if limits.baseline else {}
    notes = [
        f"{stats.path}: {sentence}"
        for stats in models
        if stats.path in grown
        if (sentence := growth_sentence(stats, earlier, reporter.settings.units))
    ]
    return reporter.show(size_report(models, checks, failures, compressor, notes))


command = make_command(size)
