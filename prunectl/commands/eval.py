"""`prunectl eval`: how good is each file?"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from prunectl.analysis.sizes import LimitCheck
from prunectl.commands._command import (
    builder_option,
    custom_objects_option,
    import_option,
    make_command,
    option_group,
    resolve_stdin,
    with_given_path,
)
from prunectl.commands._requests import import_first
from prunectl.errors import PrunectlError, UsageError, attempt
from prunectl.reporting.report import Cell, Column, Failure, Report, Table, Unit
from prunectl.reporting.reporter import Reporter
from prunectl.training.evaluate import Evaluation, evaluate_baseline, evaluate_file
from prunectl.training.max_drop import MaxDrop, check_max_drop, improvement, is_fraction, parse_drop
from prunectl.training.request import FinetuneRequest, parse_request
from prunectl.units import parse_ratio

_DIGITS = 6
_DEFAULT = FinetuneRequest("")
_data = option_group("Data")
_limit = option_group("Limits (exit code 1 if a model exceeds one)")
_file = option_group("Model code")


@dataclass(frozen=True, slots=True)
class MetricLimits:
    """The limits of a metric; None for no limit."""

    lowest: float | None
    highest: float | None
    drop: MaxDrop | None


def evaluate(
    ctx: typer.Context,
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="Model files or folders; - reads standard input.")
    ],
    *,
    data: Annotated[str, _data(metavar="SPEC", help="Data with targets, e.g. test.npz.")],
    metric: Annotated[
        list[str] | None,
        _data(metavar="NAME", help="Metric, e.g. accuracy or f.py:fn:max; repeatable, the first is the one compared."),
    ] = None,
    loss: Annotated[str, _data(metavar="NAME", help="Loss, e.g. cross-entropy, mse or f.py:fn.")] = "",
    batch_size: Annotated[int, _data(help="Examples per batch.", min=1)] = _DEFAULT.batch_size,
    device: Annotated[str, _data(help="Device: cpu, cuda, cuda:1, mps; gpu:1 for Keras.")] = _DEFAULT.means.device,
    seed: Annotated[int, _data(help="Seed of all random choices.")] = _DEFAULT.means.seed,
    against: Annotated[str, _limit(metavar="FILE", help="Model to compare with, e.g. the dense one.")] = "",
    max_drop: Annotated[str, _limit(metavar="DROP", help="Largest drop of the metric from --against, e.g. 1pp.")] = "",
    min_: Annotated[str, _limit("--min", metavar="VALUE", help="Lowest value of the metric, e.g. 95%.")] = "",
    max_: Annotated[str, _limit("--max", metavar="VALUE", help="Highest value of a loss or an error.")] = "",
    builder: Annotated[str, builder_option(_file)] = "",
    custom_objects: Annotated[str, custom_objects_option(_file)] = "",
    imports: Annotated[list[str] | None, import_option(_file)] = None,
    trust: Annotated[bool, _file("--trust", help="Allow code stored in the models to run.")] = False,
) -> int:
    """Measure how good models are on data: any format that can be run, several at once.

    Nothing is written. The metric is the one that fits the targets, unless --metric names it.

    [dim]$[/] prunectl eval small.h5 --data test.npz

    [dim]$[/] prunectl eval model.onnx --data test.npz --against model.h5 --max-drop 1pp

    [dim]$[/] prunectl eval net.pt --builder net.py:Net --data test.npz --min 95%
    """
    reporter: Reporter = ctx.obj
    if max_drop and not against:
        raise UsageError("--max-drop needs a model to compare with", hint="add --against model.h5")
    limits = MetricLimits(
        _value("--min", min_) if min_ else None,
        _value("--max", max_) if max_ else None,
        parse_drop(max_drop) if max_drop else None,
    )
    import_first(imports or ())
    request = parse_request(
        {
            "data": data,
            "metric": metric,
            "loss": loss,
            "batch_size": batch_size,
            "device": device,
            "seed": seed,
            "builder": builder,
            "custom_objects": custom_objects,
            "trust": trust,
        }
    )
    # First, since nothing can be compared without it.
    dense = evaluate_baseline(Path(against), request, reporter.progress) if against else None
    has_limits = bool(against or min_ or max_)
    results: list[tuple[str, Evaluation]] = [] if dense is None else [(against, dense)]
    failures = []
    for name in paths:
        with resolve_stdin(name) as path:
            judge = evaluate_baseline if has_limits else evaluate_file
            result = attempt(partial(judge, request=request, meter=reporter.progress), path)
        if isinstance(result, PrunectlError):
            failures.append(Failure(name, with_given_path(result, path, name)))
        else:
            results.append((name, result))
    own = results if dense is None else results[1:]
    gates = [gate for name, result in own for gate in _gates(name, result, dense, limits)]
    return reporter.show(evaluation_report(results, dense, gates, failures))


def evaluation_report(
    results: Sequence[tuple[str, Evaluation]],
    dense: Evaluation | None,
    gates: Sequence[LimitCheck],
    failures: Sequence[Failure],
) -> Report:
    """The report on the metrics of models, and with a dense model on how much they lost."""
    columns = [Column("path"), Column("metric"), Column("value", Unit.NUMBER)]
    if dense is not None:
        columns.append(Column("drop", Unit.NUMBER))
    rows = [
        (path, metric, value, _drop(dense, result) if metric == result.metric else None)[: len(columns)]
        for path, result in results
        for metric, value in sorted(result.logs.items(), key=lambda item: item[0] != result.metric)
    ]
    notes = dict.fromkeys(note for _, result in results for note in result.notes)
    return Report(
        models=(),
        table=Table("metrics", tuple(columns), tuple(rows)),
        gates=tuple(gates),
        failures=tuple(failures),
        notes=tuple(notes),
        next_step="" if dense is None or failures else shlex.join(["prunectl", "size", *(path for path, _ in results)]),
        quiet_lines=tuple(f"{result.value:.6g}" for _, result in results),
        extra_json={"evaluations": [_as_json(path, result, dense) for path, result in results]},
    )


def _drop(dense: Evaluation | None, result: Evaluation) -> Cell:
    if dense is None or dense is result or dense.metric != result.metric:
        return None
    return _lost(dense, result)


def _lost(dense: Evaluation, result: Evaluation) -> float:
    """How much worse a model is; differences within the precision of single floats count as none."""
    return round(-improvement(dense.value, result.value, higher_is_better=dense.higher_is_better), _DIGITS) + 0.0


def _as_json(path: str, result: Evaluation, dense: Evaluation | None) -> dict[str, Any]:
    numbers = {name: value if math.isfinite(value) else None for name, value in result.logs.items()}
    return {
        "path": path,
        "metric": result.metric,
        "value": numbers[result.metric],
        "higher_is_better": result.higher_is_better,
        "logs": numbers,
        "drop": _drop(dense, result),
    }


def _gates(path: str, result: Evaluation, dense: Evaluation | None, limits: MetricLimits) -> list[LimitCheck]:
    """The limits that are set, each with the value of a model."""
    better = result.higher_is_better
    gates = []
    for option, limit, is_asked in (("--min", limits.lowest, better), ("--max", limits.highest, not better)):
        if limit is None:
            continue
        if not is_asked:
            other = "--max" if option == "--min" else "--min"
            raise UsageError(
                f"{option} does not go with {result.metric}, which is better when it is "
                f"{'higher' if better else 'lower'}",
                hint=f"use {other}",
            )
        is_ok = result.value >= limit if better else result.value <= limit
        is_share = is_fraction(result.value, higher_is_better=better)
        gate = f"{option.strip('-')}-metric"
        gates.append(LimitCheck(gate, result.metric, limit, result.value, is_ok, path, is_share=is_share))
    if limits.drop is not None and dense is not None:
        check_max_drop(limits.drop, dense.metric, dense.value, higher_is_better=dense.higher_is_better)
        if dense.metric != result.metric:
            raise UsageError(
                f"{path} was measured by {result.metric}, and the model it is compared with by {dense.metric}",
                hint="name one with --metric",
            )
        drop = _lost(dense, result)
        is_share = is_fraction(dense.value, higher_is_better=better)
        is_ok = drop <= limits.drop.amount
        gates.append(LimitCheck("max-drop", result.metric, limits.drop.amount, drop, is_ok, path, is_share=is_share))
    return gates


def _value(option: str, text: str) -> float:
    if text.strip().endswith("%"):
        return parse_ratio(text)
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{option} {text!r} is not a number", hint="write 0.95, or 95%") from None


command = make_command(evaluate)
# Not that of the function, which would hide the one of Python.
command.name = "eval"
