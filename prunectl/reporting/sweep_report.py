"""What `sweep` says: how good and how big every point is, and which of them no other beats in both."""

from __future__ import annotations

from typing import Any

from prunectl.errors import PrunectlError
from prunectl.reporting.report import Artifact, Failure, Report, Section
from prunectl.reporting.sweep_plot import plot
from prunectl.reporting.table import Cell, Column, Table, Unit
from prunectl.sweeping.combined import UNSTRUCTURED, fixed, left_out, ways
from prunectl.sweeping.front import front
from prunectl.sweeping.limit import amount, drop, finite
from prunectl.sweeping.point import BASE, Outcome, Point, Way
from prunectl.sweeping.sweep import Swept
from prunectl.sweeping.versus import Versus, versus
from prunectl.units import count, nbytes, percent


def sweep_report(found: Swept, model: str) -> Report:
    """Return the report on a sweep."""
    best = front(found.outcomes)
    table = Table("points", _columns(found), tuple(_row(found, point, best) for point in found.outcomes))
    notes = dict.fromkeys(note for outcome in found.outcomes.values() for note in outcome.notes)
    remarks = (
        *found.again,
        *notes,
        *_judged_by(found),
        *_shapes(found),
        *(_compared(one, found) for one in versus(found.choices, found.outcomes)),
    )
    made = [(str(found.folder / outcome.path), outcome) for outcome in found.outcomes.values() if outcome.path]
    metric = found.base.metric
    return Report(
        models=tuple(_json(found, point, best, model) for point in found.outcomes),
        main=table,
        sections=(
            Section(f"{model}: {count(len(made))} ways to prune", tables=(table,), remarks=remarks),
            *(
                [Section(f"within a drop of {_limit(found)}", tables=(_held(found),))]
                if found.max_drop is not None
                else []
            ),
            *([Section(f"{metric} over gzip size", tables=(plot(found, best),))] if made else []),
        ),
        failures=tuple(Failure(point.name, error) for point, error in found.failed.items()),
        artifacts=tuple(Artifact(path, outcome.raw) for path, outcome in made),
        bare=tuple(_file(found, point) for point in best if point != BASE),
        more={"max_drop": _held_json(found)} if found.max_drop is not None else {},
    )


def told(point: Point, found: Outcome | PrunectlError) -> str:
    """Return what became of a point, in a line."""
    if isinstance(found, PrunectlError):
        return f"{point.name}: {found.message}"
    if not found.is_number:
        return f"{point.name}: {found.metric or 'what decides'} is no number"
    return f"{point.name}: {found.metric} {found.value:.4g}, gzip {nbytes(found.gzip)}"


def _has(found: Swept) -> tuple[bool, bool]:
    """Whether there are patterns to tell apart, and parameters."""
    return found.choices.patterns != (UNSTRUCTURED,), bool(found.choices.params)


def _named(found: Swept, way: Way) -> tuple[Cell, ...]:
    has_patterns, has_params = _has(found)
    pattern = way.pattern or (UNSTRUCTURED if way != BASE.way else "")
    more = (*([pattern] if has_patterns else []), *([way.params] if has_params else []))
    return (way.strategy or "as it is", way.scope, way.schedule, *more)


def _columns(found: Swept) -> tuple[Column, ...]:
    has_patterns, has_params = _has(found)
    return (
        Column("strategy"),
        Column("scope"),
        Column("schedule", is_optional=True),
        *([Column("pattern")] if has_patterns else []),
        *([Column("parameters")] if has_params else []),
        Column("asked", Unit.RATIO),
        Column("sparsity", Unit.RATIO, is_optional=True),
        Column(found.base.metric, Unit.NUMBER),
        Column("drop", Unit.NUMBER),
        Column("gzip", Unit.BYTES),
        Column("front"),
        Column("file", is_optional=True),
    )


def _row(found: Swept, point: Point, best: list[Point]) -> tuple[Cell, ...]:
    outcome = found.outcomes[point]
    is_there = bool(outcome.path) or point == BASE
    return (
        *_named(found, point.way),
        point.sparsity if point != BASE else None,
        outcome.sparsity if is_there else None,
        finite(outcome.value),
        finite(drop(outcome, found.base)),
        outcome.gzip if is_there else None,
        "*" if point in best else "",
        _file(found, point),
    )


def _file(found: Swept, point: Point) -> str:
    path = found.outcomes[point].path
    return str(found.folder / path) if path else ""


def _held(found: Swept) -> Table:
    """Return the largest sparsity of each way that keeps within the drop."""
    rows: list[tuple[Cell, ...]] = []
    for way, point in found.best.items():
        row = _row(found, point, []) if point is not None else (*_named(found, way), *[None] * 5, "", "none")
        rows.append((*row[:-2], row[-1]))
    columns = [column for column in _columns(found) if column.name != "front"]
    return Table("within", tuple(columns), tuple(rows))


def _held_json(found: Swept) -> list[dict[str, Any]]:
    return [
        {
            "strategy": way.strategy,
            "scope": way.scope,
            "schedule": way.schedule or None,
            "pattern": way.pattern or UNSTRUCTURED,
            "params": way.params or None,
            "limit": found.max_drop.amount if found.max_drop is not None else None,
            "sparsity": point.sparsity if point is not None else None,
            "path": _file(found, point) if point is not None else None,
        }
        for way, point in found.best.items()
    ]


def _json(found: Swept, point: Point, best: list[Point], model: str) -> dict[str, Any]:
    outcome = found.outcomes[point]
    is_there = bool(outcome.path) or point == BASE
    return {
        "path": _file(found, point) or (model if point == BASE else None),
        "bytes": {
            "raw": outcome.raw if is_there else None,
            "packed": None,
            "compressed": outcome.gzip if is_there else None,
        },
        "sparsity": outcome.sparsity if is_there else None,
        "point": {
            "strategy": point.strategy or None,
            "scope": point.scope or None,
            "schedule": point.schedule or None,
            "pattern": point.pattern or (UNSTRUCTURED if point != BASE else None),
            "params": point.params or None,
            "sparsity": point.sparsity,
            "metric": outcome.metric,
            "value": finite(outcome.value),
            "logs": outcome.logs,
            "drop": finite(drop(outcome, found.base)),
            "is_front": point in best,
        },
    }


def _judged_by(found: Swept) -> tuple[str, ...]:
    choices = found.choices
    if choices.val or choices.val_split:
        return ()
    return (f"Judged by {choices.data} itself: say --val or --val-split to know what holds on other data.",)


def _shapes(found: Swept) -> tuple[str, ...]:
    """Say which patterns decide the sparsity by themselves, and what was left out."""
    fixed_by = {way.pattern: fixed(way.pattern) for way in ways(found.choices)}
    decided = (
        f"{pattern} decides the sparsity by itself: it is tried at {percent(share)} alone."
        for pattern, share in fixed_by.items()
        if share is not None
    )
    reasons: dict[str, list[str]] = {}
    for way, reason in left_out(found.choices).items():
        reasons.setdefault(reason, []).append(" ".join(filter(None, way)))
    left = (f"Left out: {', '.join(names)}: {reason}." for reason, names in reasons.items())
    return (*decided, *left)


def _limit(found: Swept) -> str:
    return _amount(found, found.max_drop.amount) if found.max_drop is not None else ""


def _compared(one: Versus, found: Swept) -> str:
    """Answer which of two schedules is better here, and say so where the pairs do not agree."""
    ahead, behind = (one.other, one.one) if one.mean >= 0 else (one.one, one.other)
    sign = 1 if one.mean >= 0 else -1
    gains = sorted(sign * gain for gain in one.gains)
    wins, losses = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    amount = f"{_amount(found, abs(one.mean))} of {found.base.metric} on average"
    where = f"in {count(wins)} of {count(len(gains))} {'pair' if len(gains) == 1 else 'pairs'}"
    question = f"{one.one} or {one.other}?"
    if not wins and not losses:
        return f"{question} It makes no difference to {found.base.metric} here."
    if not losses:
        same = f", and no worse in {count(len(gains) - wins)}" if wins < len(gains) else ""
        return f"{question} {ahead} is better than {behind} {where}{same}, by {amount}."
    span = f"from {_amount(found, gains[0])} to {_amount(found, gains[-1])}"
    return f"{question} No clear answer: {ahead} is better {where}, by {amount} ({span})."


def _amount(found: Swept, value: float) -> str:
    """Return a difference: in percentage points where the metric is a share."""
    return amount(value, found.base)
