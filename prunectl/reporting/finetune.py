"""What `finetune` says: how good the model was and is, how it got there, that its zeros are all there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from prunectl.reporting.prune import before_after
from prunectl.reporting.report import Artifact, Cell, Column, Report, Section, Table, Unit
from prunectl.reporting.serialize import survey_json
from prunectl.training.finetune import Finetuned
from prunectl.training.monitor import first_of, judged_by
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


def finetune_report(found: Finetuned, model: str, output: str) -> Report:
    """Return the report on a run."""
    result = Table("result", _RESULT, (_result(found, output),))
    epochs = _epochs(found)
    tables = (*([epochs] if epochs.rows else []), before_after(found.before, found.after))
    remarks = (*found.notes, f"Next: prunectl size {output}")
    training = {
        "steps": found.course.steps,
        "best_epoch": found.best_epoch,
        "zeros": found.masked,
        "zeros_kept": found.kept,
        "before": _finite(found.judged_before),
        "after": _finite(found.judged_after),
    }
    return Report(
        models=(survey_json(found.before), {**survey_json(found.after), "training": training}),
        main=result,
        sections=(Section(f"{model} -> {output}", _facts(found), tables, remarks),),
        artifacts=(Artifact(output, found.after.bytes.raw),),
        bare=(),
    )


def _result(found: Finetuned, output: str) -> tuple[Cell, ...]:
    name = judged_by(found.judged_after, first_of(found.request.means)) if found.judged_after else ""
    return (
        output,
        name,
        found.judged_before.get(name),
        found.judged_after.get(name),
        found.after.prunable_sparsity,
        found.after.bytes.raw,
        found.before.bytes.compressed,
        found.after.bytes.compressed,
        found.kept,
        found.masked,
        _how(found),
    )


def _how(found: Finetuned) -> str:
    request = found.request
    asked, ramping = request.pruning, request.ramping
    pruning = (asked.strategy, asked.pattern, asked.scope, ramping.name or "polynomial") if request.prunes else ()
    return ", ".join(filter(None, (*pruning, f"{count(found.course.steps)} steps of {found.course.batch_size}")))


def _facts(found: Finetuned) -> tuple[tuple[str, str], ...]:
    facts = [("trained", _how(found))]
    for name, after in found.judged_after.items():
        facts.append((name, f"{_number(found.judged_before.get(name))} -> {_number(after)}"))
    if found.best_epoch is not None:
        facts.append(("weights", f"of epoch {found.best_epoch}, the best"))
    facts.append(("zeros kept", f"{count(found.kept)} / {count(found.masked)}"))
    return tuple(facts)


def _epochs(found: Finetuned) -> Table:
    names = list(dict.fromkeys(name for entry in found.history for name in entry.train))
    judged = list(dict.fromkeys(name for entry in found.history for name in entry.val))
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
        for entry in found.history
    )
    return Table("epochs", tuple(columns), rows)


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.4g}"


def _finite(numbers: Mapping[str, float]) -> dict[str, Any]:
    return {name: value if math.isfinite(value) else None for name, value in numbers.items()}
