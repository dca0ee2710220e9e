"""What `finetune` says: how good the model was and is, how it got there, that its zeros are all there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from prunectl.reporting.prune import before_after
from prunectl.reporting.report import Artifact, Cell, Column, Report, Section, Table, Unit
from prunectl.reporting.serialize import survey_json
from prunectl.training.finetune import FinetuneResult
from prunectl.training.monitor import monitored_log, monitored_metric
from prunectl.units import count

_RESULT = (
    Column("model"),
    Column("metric"),
    Column("before", Unit.NUMBER),
    Column("after", Unit.NUMBER),
    Column("sparsity", Unit.RATIO),
    Column("raw", Unit.BYTES, is_optional=True),
    Column("gzip before", Unit.BYTES),
    Column("gzip after", Unit.BYTES),
    Column("zeros kept", Unit.COUNT),
    Column("zeros", Unit.COUNT),
    Column("how"),
)


def finetune_report(result: FinetuneResult, model: str, output: str) -> Report:
    """The report on a run."""
    table = Table("result", _RESULT, (_result(result, output),))
    epochs = _epochs(result)
    tables = (*([epochs] if epochs.rows else []), before_after(result.before, result.after))
    notes = (*result.notes, f"Next: prunectl size {output}")
    training = {
        "steps": result.course.steps,
        "best_epoch": result.best_epoch,
        "zeros": result.masked,
        "zeros_kept": result.kept,
        "before": _finite(result.judged_before),
        "after": _finite(result.judged_after),
    }
    return Report(
        models=(survey_json(result.before), {**survey_json(result.after), "training": training}),
        table=table,
        sections=(Section(f"{model} -> {output}", _facts(result), tables, notes),),
        artifacts=(Artifact(output, result.after.bytes.raw),),
        quiet_lines=(),
    )


def _result(result: FinetuneResult, output: str) -> tuple[Cell, ...]:
    name = monitored_log(result.judged_after, monitored_metric(result.request.means)) if result.judged_after else ""
    return (
        output,
        name,
        result.judged_before.get(name),
        result.judged_after.get(name),
        result.after.prunable_sparsity,
        result.after.bytes.raw,
        result.before.bytes.compressed,
        result.after.bytes.compressed,
        result.kept,
        result.masked,
        _method(result),
    )


def _method(result: FinetuneResult) -> str:
    request = result.request
    pruning, ramping = request.pruning, request.ramping
    parts = (pruning.strategy, pruning.pattern, pruning.scope, ramping.name or "polynomial") if request.prunes else ()
    return ", ".join(filter(None, (*parts, f"{count(result.course.steps)} steps of {result.course.batch_size}")))


def _facts(result: FinetuneResult) -> tuple[tuple[str, str], ...]:
    facts = [("trained", _method(result))]
    for name, after in result.judged_after.items():
        facts.append((name, f"{_number(result.judged_before.get(name))} -> {_number(after)}"))
    if result.best_epoch is not None:
        facts.append(("weights", f"of epoch {result.best_epoch}, the best"))
    facts.append(("zeros kept", f"{count(result.kept)} / {count(result.masked)}"))
    return tuple(facts)


def _epochs(result: FinetuneResult) -> Table:
    names = list(dict.fromkeys(name for entry in result.history for name in entry.train))
    judged = list(dict.fromkeys(name for entry in result.history for name in entry.val))
    columns = [
        Column("epoch"),
        Column("sparsity", Unit.RATIO),
        *(Column(name, Unit.NUMBER) for name in names),
        *(Column(f"val {name}", Unit.NUMBER) for name in judged),
    ]
    rows = tuple(
        (
            str(entry.epoch),
            entry.sparsity,
            *(entry.train.get(name) for name in names),
            *(entry.val.get(name) for name in judged),
        )
        for entry in result.history
    )
    return Table("epochs", tuple(columns), rows)


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.4g}"


def _finite(numbers: Mapping[str, float]) -> dict[str, Any]:
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}
