"""The report of `bench`: latencies with their intervals, and a verdict in a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunectl.analysis.sizes import LimitCheck
from prunectl.analysis.timing import Interval, Latency, Verdict
from prunectl.errors import WorkError
from prunectl.reporting.report import Column, Failure, Report, Table, Unit
from prunectl.units import duration

if TYPE_CHECKING:
    from prunectl.exporting.bench import BenchedModel, Benchmark


_COLUMNS = (
    Column("path"),
    Column("runtime"),
    Column("batch", Unit.COUNT),
    Column("median", Unit.SECONDS),
    Column("low", Unit.SECONDS, title="95 % from"),
    Column("high", Unit.SECONDS, title="to"),
    Column("minimum", Unit.SECONDS, is_optional=True),
    Column("throughput", Unit.NUMBER, is_optional=True, title="per second"),
    Column("memory", Unit.BYTES, is_optional=True),
    Column("speedup", Unit.FACTOR, title="speed"),
)
"""The last column only for several models."""


def bench_report(benchmark: Benchmark, max_latency: float | None = None, min_speedup: float | None = None) -> Report:
    """The report on the latencies of models."""
    models, has_others = benchmark.models, len(benchmark.models) > 1
    names = _names(models)
    rows, sentences, judged = [], [], []
    for size, latencies in benchmark.latencies.items():
        for index, (model, latency) in enumerate(zip(models, latencies, strict=True)):
            median = latency.median
            rows.append(
                (
                    *(model.path, model.runtime, size, median.middle, median.low, median.high),
                    *(latency.minimum, size / median.middle, model.memory),
                    *(() if not has_others else (latency.speedup.middle,)),
                )
            )
            if index:
                batch = f" at batch size {size}" * (len(benchmark.latencies) > 1)
                reason = f" {model.runtime} ignores zeros." if _has_only_more_zeros(models[0], model) else ""
                sentences.append(comparison(names[0], names[index], latency, batch, reason))
            judged += _judge(model, latency, max_latency, min_speedup if index else None)
    return Report(
        models=(),
        table=Table("latencies", _COLUMNS if has_others else _COLUMNS[:-1], tuple(rows)),
        gates=tuple(gate for gate in judged if isinstance(gate, LimitCheck)),
        failures=tuple(failure for failure in judged if isinstance(failure, Failure)),
        notes=(*sentences, *benchmark.notes),
        next_step=_next_step(benchmark),
        quiet_lines=tuple(f"{row[3]:.6g}" for row in rows),
        extra_json={"latencies": _as_json(benchmark)},
    )


def comparison(first: str, other: str, latency: Latency, batch: str = "", reason: str = "") -> str:
    """A sentence that compares the latency of a model with the first; `reason` explains why they are the same."""
    speedup = latency.speedup
    between = f"{_factor(speedup.low)} to {_factor(speedup.high)}"
    if latency.verdict is Verdict.FASTER:
        return f"{other} is {_factor(speedup.middle)} times as fast as {first}{batch} ({between})."
    if latency.verdict is Verdict.SLOWER:
        longer = f"{_factor(1 / speedup.high)} to {_factor(1 / speedup.low)}"
        times = f"{_factor(1 / speedup.middle)} times"
        return f"{other} is slower than {first}{batch}: a run takes {times} as long ({longer})."
    if latency.verdict is Verdict.UNCLEAR:
        return (
            f"{other} cannot be told apart from {first}{batch}: the speed-up lies between {_factor(speedup.low)} and "
            f"{_factor(speedup.high)}. Measure longer, or while the machine does nothing else."
        )
    return f"{other} is as fast as {first}{batch}: the difference is within noise ({between}).{reason}"


def _factor(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.3g}"


def _names(models: Sequence[BenchedModel]) -> list[str]:
    """The names of the files, or their paths where two have the same name."""
    names = [Path(model.path).name for model in models]
    return names if len(set(names)) == len(names) else [model.path for model in models]


_MORE_ZEROS = 0.1


def _has_only_more_zeros(first: BenchedModel, model: BenchedModel) -> bool:
    """Whether a model seems to differ from the first by zeros only: as many weights, and the same runtime."""
    has_more = (model.sparsity or 0.0) > (first.sparsity or 0.0) + _MORE_ZEROS
    return has_more and first.params == model.params and first.runtime == model.runtime


def _next_step(benchmark: Benchmark) -> str:
    first = benchmark.models[0]
    for latencies in benchmark.latencies.values():
        for model, latency in zip(benchmark.models, latencies, strict=True):
            if latency.verdict is Verdict.SAME and _has_only_more_zeros(first, model):
                path = Path(first.path)
                output = path.with_name(f"{path.stem}-channels{path.suffix}")
                return f"prunectl prune {path} -o {output} --pattern channel -s 50%"
    return ""


def _judge(
    model: BenchedModel, latency: Latency, max_latency: float | None, min_speedup: float | None
) -> list[LimitCheck | Failure]:
    """A check of each limit; a failure where the limit lies within the confidence interval."""
    judged: list[LimitCheck | Failure] = []
    if max_latency is not None:
        median = latency.median
        if median.low <= max_latency < median.high:
            between = f"{duration(median.low)} to {duration(median.high)}"
            judged.append(_too_near(model, f"a run takes {between}", f"--max-latency {duration(max_latency)}"))
        else:
            is_ok = median.middle <= max_latency
            judged.append(LimitCheck("max-latency", "seconds", max_latency, median.middle, is_ok, model.path))
    if min_speedup is not None:
        speedup = latency.speedup
        if speedup.low < min_speedup <= speedup.high:
            between = f"{speedup.low:.2f} to {speedup.high:.2f}"
            judged.append(_too_near(model, f"it is {between} times as fast", f"--min-speedup {min_speedup:g}"))
        else:
            is_ok = speedup.middle >= min_speedup
            judged.append(LimitCheck("min-speedup", "speedup", min_speedup, speedup.middle, is_ok, model.path))
    return judged


def _too_near(model: BenchedModel, measured: str, limit: str) -> Failure:
    return Failure(
        model.path,
        WorkError(
            f"{model.path} cannot be judged: {measured}, too near {limit}",
            hint="measure longer with --seconds, or while the machine does nothing else",
        ),
    )


def _as_json(benchmark: Benchmark) -> list[dict[str, Any]]:
    return [
        {
            **{name: value for name, value in asdict(model).items() if name != "sparsity"},
            "sparsity": model.sparsity,
            "batch_size": size,
            "threads": benchmark.threads,
            "samples": latency.samples,
            "median": _interval(latency.median),
            "minimum": latency.minimum,
            "throughput": size / latency.median.middle,
            "speedup": None if index == 0 else {**_interval(latency.speedup), "verdict": latency.verdict.value},
        }
        for size, latencies in benchmark.latencies.items()
        for index, (model, latency) in enumerate(zip(benchmark.models, latencies, strict=True))
    ]


def _interval(interval: Interval) -> dict[str, float]:
    return {"value": interval.middle, "low": interval.low, "high": interval.high}
