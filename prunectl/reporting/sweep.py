"""What `sweep` says: how good and how big every point is, and which of them no other beats in both."""

from __future__ import annotations

from typing import Any

from prunectl.errors import PrunectlError
from prunectl.reporting.plots import braille_plot
from prunectl.reporting.report import Artifact, Cell, Column, Failure, Report, Section, Table, Unit
from prunectl.sweeping.bisection import amount, drop, finite
from prunectl.sweeping.grid import UNSTRUCTURED, implied_sparsity, skipped_combinations, variants
from prunectl.sweeping.sweep import ScheduleComparison, Swept, compare_schedules, pareto_front
from prunectl.sweeping.trial import BASELINE, Trial, TrialResult, Variant
from prunectl.units import count, nbytes, percent

_COLUMNS, _ROWS = 60, 12
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def plot(found: Swept, best: list[Trial]) -> Table:
    """Return the points as letters, a letter for each way, above the steps of the front."""
    outcomes = {point: outcome for point, outcome in found.outcomes.items() if outcome.is_number}
    tried = list(dict.fromkeys(point.way for point in outcomes if point != BASELINE))
    sizes = [outcome.gzip for outcome in outcomes.values()]
    values = [outcome.value for outcome in outcomes.values()]
    left, wide = min(sizes), max(max(sizes) - min(sizes), 1)
    low, high = min(values), max(values)
    tall = high - low or 1.0
    is_up = found.base.is_more_better
    steps: list[float] = []
    for x in range(2 * _COLUMNS):
        size = left + x / (2 * _COLUMNS - 1) * wide
        reached = [outcomes[point].value for point in best if outcomes[point].gzip <= size]
        at = (max(reached) if is_up else min(reached)) if reached else (low if is_up else high)
        steps.append((at - low) / tall)
    grid = [list(line.ljust(_COLUMNS, "\u2800")) for line in braille_plot(steps, _COLUMNS, _ROWS)]
    for point, outcome in reversed(outcomes.items()):
        column = round((outcome.gzip - left) / wide * (_COLUMNS - 1))
        row = round((high - outcome.value) / tall * (_ROWS - 1))
        letter = "=" if point == BASELINE else _LETTERS[tried.index(point.way) % len(_LETTERS)]
        grid[row][column] = letter.upper() if point in best else letter
    marks = [f"{high:.4g}", *[""] * (_ROWS - 2), f"{low:.4g}"]
    ends = [nbytes(size) for size in (left, left + wide)]
    names = [f"{_LETTERS[at % len(_LETTERS)]} {' '.join(filter(None, way))}" for at, way in enumerate(tried)]
    rows: list[tuple[Cell, ...]] = [(mark, "".join(line)) for mark, line in zip(marks, grid, strict=True)]
    rows.append(("gzip", f"{ends[0]}{ends[1]:>{_COLUMNS - len(ends[0])}}"))
    rows += [("", name) for name in (*names, "= as it is", "capitals: no other is as good and smaller")]
    return Table("plot", (Column(found.base.metric), Column("")), tuple(rows))


def sweep_report(found: Swept, model: str) -> Report:
    """Return the report on a sweep."""
    best = pareto_front(found.outcomes)
    table = Table("points", _columns(found), tuple(_row(found, point, best) for point in found.outcomes))
    notes = dict.fromkeys(note for outcome in found.outcomes.values() for note in outcome.notes)
    remarks = (
        *found.again,
        *notes,
        *_judged_by(found),
        *_shapes(found),
        *(_compared(one, found) for one in compare_schedules(found.choices, found.outcomes)),
    )
    made = [(str(found.folder / outcome.path), outcome) for outcome in found.outcomes.values() if outcome.path]
    metric = found.base.metric
    return Report(
        models=tuple(_json(found, point, best, model) for point in found.outcomes),
        main=table,
        sections=(
            Section(f"{model}: {count(len(made))} ways to prune", tables=(table,), remarks=remarks),
            *(
                [Section(f"within a drop of {_limit(found)}", tables=(_search_section(found),))]
                if found.max_drop is not None
                else []
            ),
            *([Section(f"{metric} over gzip size", tables=(plot(found, best),))] if made else []),
        ),
        failures=tuple(Failure(point.name, error) for point, error in found.failed.items()),
        artifacts=tuple(Artifact(path, outcome.raw) for path, outcome in made),
        bare=tuple(_file(found, point) for point in best if point != BASELINE),
        more={"max_drop": _held_json(found)} if found.max_drop is not None else {},
    )


def trial_line(point: Trial, found: TrialResult | PrunectlError) -> str:
    """Return what became of a point, in a line."""
    if isinstance(found, PrunectlError):
        return f"{point.name}: {found.message}"
    if not found.is_number:
        return f"{point.name}: {found.metric or 'what decides'} is no number"
    return f"{point.name}: {found.metric} {found.value:.4g}, gzip {nbytes(found.gzip)}"


def _optional_columns(found: Swept) -> tuple[bool, bool]:
    """Whether there are patterns to tell apart, and parameters."""
    return found.choices.patterns != (UNSTRUCTURED,), bool(found.choices.params)


def _trial_name(found: Swept, way: Variant) -> tuple[Cell, ...]:
    has_patterns, has_params = _optional_columns(found)
    pattern = way.pattern or (UNSTRUCTURED if way != BASELINE.way else "")
    more = (*([pattern] if has_patterns else []), *([way.params] if has_params else []))
    return (way.strategy or "as it is", way.scope, way.schedule, *more)


def _columns(found: Swept) -> tuple[Column, ...]:
    has_patterns, has_params = _optional_columns(found)
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


def _row(found: Swept, point: Trial, best: list[Trial]) -> tuple[Cell, ...]:
    outcome = found.outcomes[point]
    is_there = bool(outcome.path) or point == BASELINE
    return (
        *_trial_name(found, point.way),
        point.sparsity if point != BASELINE else None,
        outcome.sparsity if is_there else None,
        finite(outcome.value),
        finite(drop(outcome, found.base)),
        outcome.gzip if is_there else None,
        "*" if point in best else "",
        _file(found, point),
    )


def _file(found: Swept, point: Trial) -> str:
    path = found.outcomes[point].path
    return str(found.folder / path) if path else ""


def _search_section(found: Swept) -> Table:
    """Return the largest sparsity of each way that keeps within the drop."""
    rows: list[tuple[Cell, ...]] = []
    for way, point in found.best.items():
        row = _row(found, point, []) if point is not None else (*_trial_name(found, way), *[None] * 5, "", "none")
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


def _json(found: Swept, point: Trial, best: list[Trial], model: str) -> dict[str, Any]:
    outcome = found.outcomes[point]
    is_there = bool(outcome.path) or point == BASELINE
    return {
        "path": _file(found, point) or (model if point == BASELINE else None),
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
            "pattern": point.pattern or (UNSTRUCTURED if point != BASELINE else None),
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
    fixed_by = {way.pattern: implied_sparsity(way.pattern) for way in variants(found.choices)}
    decided = (
        f"{pattern} decides the sparsity by itself: it is tried at {percent(share)} alone."
        for pattern, share in fixed_by.items()
        if share is not None
    )
    reasons: dict[str, list[str]] = {}
    for way, reason in skipped_combinations(found.choices).items():
        reasons.setdefault(reason, []).append(" ".join(filter(None, way)))
    left = (f"Left out: {', '.join(names)}: {reason}." for reason, names in reasons.items())
    return (*decided, *left)


def _limit(found: Swept) -> str:
    return _format_drop(found, found.max_drop.amount) if found.max_drop is not None else ""


def _compared(one: ScheduleComparison, found: Swept) -> str:
    """Answer which of two schedules is better here, and say so where the pairs do not agree."""
    ahead, behind = (one.other, one.one) if one.mean >= 0 else (one.one, one.other)
    sign = 1 if one.mean >= 0 else -1
    gains = sorted(sign * gain for gain in one.gains)
    wins, losses = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    amount = f"{_format_drop(found, abs(one.mean))} of {found.base.metric} on average"
    where = f"in {count(wins)} of {count(len(gains))} {'pair' if len(gains) == 1 else 'pairs'}"
    question = f"{one.one} or {one.other}?"
    if not wins and not losses:
        return f"{question} It makes no difference to {found.base.metric} here."
    if not losses:
        same = f", and no worse in {count(len(gains) - wins)}" if wins < len(gains) else ""
        return f"{question} {ahead} is better than {behind} {where}{same}, by {amount}."
    span = f"from {_format_drop(found, gains[0])} to {_format_drop(found, gains[-1])}"
    return f"{question} No clear answer: {ahead} is better {where}, by {amount} ({span})."


def _format_drop(found: Swept, value: float) -> str:
    """Return a difference: in percentage points where the metric is a share."""
    return amount(value, found.base)
