"""The report of `sweep`: metric and size of every trial, and the Pareto front."""

from __future__ import annotations

import shlex
from typing import Any

from prunectl.errors import PrunectlError
from prunectl.pruning.request import UNSTRUCTURED
from prunectl.reporting.plots import braille_plot
from prunectl.reporting.report import Artifact, Cell, Column, Failure, Report, Section, Table, Unit
from prunectl.sweeping.grid import amount, drop, finite, implied_sparsity, skipped_combinations, variants
from prunectl.sweeping.requests import looks_at_data
from prunectl.sweeping.sweep import ScheduleComparison, Swept, compare_schedules, pareto_front
from prunectl.sweeping.trial import BASELINE, Trial, TrialResult, Variant
from prunectl.units import count, nbytes, percent

_COLUMNS, _ROWS = 60, 12
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def plot(sweep: Swept, best: list[Trial]) -> Table:
    """Plot the trials as letters, one for each variant, above the steps of the Pareto front."""
    results = {trial: result for trial, result in sweep.outcomes.items() if result.is_number}
    tried = list(dict.fromkeys(trial.variant for trial in results if trial != BASELINE))
    sizes = [result.gzip for result in results.values()]
    values = [result.value for result in results.values()]
    left, wide = min(sizes), max(max(sizes) - min(sizes), 1)
    low, high = min(values), max(values)
    tall = high - low or 1.0
    higher_is_better = sweep.base.higher_is_better
    steps: list[float] = []
    for x in range(2 * _COLUMNS):
        size = left + x / (2 * _COLUMNS - 1) * wide
        reached = [results[trial].value for trial in best if results[trial].gzip <= size]
        number = (
            (max(reached) if higher_is_better else min(reached)) if reached else (low if higher_is_better else high)
        )
        steps.append((number - low) / tall)
    grid = [list(line.ljust(_COLUMNS, "\u2800")) for line in braille_plot(steps, _COLUMNS, _ROWS)]
    # Trials on the front are drawn last, over others in the same place.
    drawn = sorted(results, key=lambda trial: trial not in best)
    for trial in reversed(drawn):
        result = results[trial]
        column = round((result.gzip - left) / wide * (_COLUMNS - 1))
        row = round((high - result.value) / tall * (_ROWS - 1))
        letter = "=" if trial == BASELINE else _LETTERS[tried.index(trial.variant) % len(_LETTERS)]
        grid[row][column] = letter.upper() if trial in best else letter
    marks = [f"{high:.4g}", *[""] * (_ROWS - 2), f"{low:.4g}"]
    ends = [nbytes(size) for size in (left, left + wide)]
    names = [
        f"{_LETTERS[number % len(_LETTERS)]} {' '.join(filter(None, variant))}" for number, variant in enumerate(tried)
    ]
    rows: list[tuple[Cell, ...]] = [(mark, "".join(line)) for mark, line in zip(marks, grid, strict=True)]
    rows.append(("gzip", f"{ends[0]}{ends[1]:>{_COLUMNS - len(ends[0])}}"))
    rows += [("", name) for name in (*names, "= the unpruned model", "capitals: on the Pareto front")]
    return Table("plot", (Column(sweep.base.metric), Column("", is_whole=True, title="plot")), tuple(rows))


def sweep_report(sweep: Swept, model: str) -> Report:
    """The report on a sweep."""
    best = pareto_front(sweep.outcomes)
    table = Table("points", _columns(sweep), tuple(_row(sweep, trial, best) for trial in sweep.outcomes))
    trial_notes = dict.fromkeys(note for result in sweep.outcomes.values() for note in result.notes)
    notes = (
        *sweep.rerun_notes,
        *trial_notes,
        *_judged_by(sweep),
        *_shapes(sweep),
        *(_compared(comparison, sweep) for comparison in compare_schedules(sweep.config, sweep.outcomes)),
    )
    files = tuple(_file(sweep, trial) for trial in best if trial != BASELINE)
    written = [(str(sweep.folder / result.path), result) for result in sweep.outcomes.values() if result.path]
    metric = sweep.base.metric
    return Report(
        models=tuple(_json(sweep, trial, best, model) for trial in sweep.outcomes),
        table=table,
        sections=(
            Section(f"{model}: {count(len(written))} pruned models", tables=(table,), notes=notes),
            *(
                [Section(f"largest sparsity with a drop of at most {_limit(sweep)}", tables=(_search_section(sweep),))]
                if sweep.max_drop is not None
                else []
            ),
            *([Section(f"{metric} against gzip size", tables=(plot(sweep, best),))] if written else []),
        ),
        failures=tuple(Failure(trial.name, error) for trial, error in sweep.failed.items()),
        artifacts=tuple(Artifact(path, result.raw) for path, result in written),
        next_step=shlex.join(["prunectl", "inspect", *files[-1:]]) if files else "",
        quiet_lines=files,
        extra_json={"max_drop": _held_json(sweep)} if sweep.max_drop is not None else {},
    )


def trial_line(trial: Trial, result: TrialResult | PrunectlError) -> str:
    """The result of a trial in a line."""
    if isinstance(result, PrunectlError):
        return f"{trial.name}: {result.message}"
    if not result.is_number:
        return f"{trial.name}: {result.metric or 'the metric'} is not a finite number"
    return f"{trial.name}: {result.metric} {result.value:.4g}, gzip {nbytes(result.gzip)}"


def _optional_columns(sweep: Swept) -> tuple[bool, bool]:
    """Whether the table needs a column of patterns, and one of parameters."""
    return sweep.config.patterns != (UNSTRUCTURED,), bool(sweep.config.params)


def _trial_name(sweep: Swept, variant: Variant) -> tuple[Cell, ...]:
    has_patterns, has_params = _optional_columns(sweep)
    pattern = variant.pattern or (UNSTRUCTURED if variant != BASELINE.variant else "")
    more = (*([pattern] if has_patterns else []), *([variant.params] if has_params else []))
    return (variant.strategy or "unpruned", variant.scope, variant.schedule, *more)


def _columns(sweep: Swept) -> tuple[Column, ...]:
    has_patterns, has_params = _optional_columns(sweep)
    return (
        Column("strategy"),
        Column("scope"),
        Column("schedule", is_optional=True),
        *([Column("pattern")] if has_patterns else []),
        *([Column("parameters")] if has_params else []),
        Column("asked", Unit.RATIO, title="target"),
        Column("sparsity", Unit.RATIO, is_optional=True),
        Column(sweep.base.metric, Unit.NUMBER),
        Column("drop", Unit.NUMBER),
        Column("gzip", Unit.BYTES),
        Column("front", title="Pareto"),
        Column("file", is_optional=True),
    )


def _row(sweep: Swept, trial: Trial, best: list[Trial]) -> tuple[Cell, ...]:
    result = sweep.outcomes[trial]
    is_there = bool(result.path) or trial == BASELINE
    return (
        *_trial_name(sweep, trial.variant),
        trial.sparsity if trial != BASELINE else None,
        result.sparsity if is_there else None,
        finite(result.value),
        finite(drop(result, sweep.base)),
        result.gzip if is_there else None,
        "*" if trial in best else "",
        _file(sweep, trial),
    )


def _file(sweep: Swept, trial: Trial) -> str:
    path = sweep.outcomes[trial].path
    return str(sweep.folder / path) if path else ""


def _search_section(sweep: Swept) -> Table:
    """A table of the largest sparsity of each variant within the drop."""
    rows: list[tuple[Cell, ...]] = []
    for variant, trial in sweep.best.items():
        row = _row(sweep, trial, []) if trial is not None else (*_trial_name(sweep, variant), *[None] * 5, "", "none")
        rows.append((*row[:-2], row[-1]))
    columns = [column for column in _columns(sweep) if column.name != "front"]
    return Table("within", tuple(columns), tuple(rows))


def _held_json(sweep: Swept) -> list[dict[str, Any]]:
    return [
        {
            "strategy": variant.strategy,
            "scope": variant.scope,
            "schedule": variant.schedule or None,
            "pattern": variant.pattern or UNSTRUCTURED,
            "params": variant.params or None,
            "limit": sweep.max_drop.amount if sweep.max_drop is not None else None,
            "sparsity": trial.sparsity if trial is not None else None,
            "path": _file(sweep, trial) if trial is not None else None,
        }
        for variant, trial in sweep.best.items()
    ]


def _json(sweep: Swept, trial: Trial, best: list[Trial], model: str) -> dict[str, Any]:
    result = sweep.outcomes[trial]
    is_there = bool(result.path) or trial == BASELINE
    return {
        "path": _file(sweep, trial) or (model if trial == BASELINE else None),
        "bytes": {
            "raw": result.raw if is_there else None,
            "packed": None,
            "compressed": result.gzip if is_there else None,
        },
        "sparsity": result.sparsity if is_there else None,
        "point": {
            "strategy": trial.strategy or None,
            "scope": trial.scope or None,
            "schedule": trial.schedule or None,
            "pattern": trial.pattern or (UNSTRUCTURED if trial != BASELINE else None),
            "params": trial.params or None,
            "sparsity": trial.sparsity,
            "metric": result.metric,
            "value": finite(result.value),
            "logs": result.logs,
            "drop": finite(drop(result, sweep.base)),
            "is_front": trial in best,
        },
    }


def _judged_by(sweep: Swept) -> tuple[str, ...]:
    choices = sweep.config
    uses_data = choices.epochs or any(looks_at_data(trial) for trial in sweep.outcomes)
    if choices.val or choices.val_split or not uses_data:
        return ()
    return (f"The models were evaluated on {choices.data}, which pruning also used: add --val or --val-split.",)


def _shapes(sweep: Swept) -> tuple[str, ...]:
    """Sentences on patterns that fix the sparsity, and on combinations that were left out."""
    fixed_by = {variant.pattern: implied_sparsity(variant.pattern) for variant in variants(sweep.config)}
    decided = (
        f"The pattern {pattern} fixes the sparsity at {percent(share)}: no other was tried."
        for pattern, share in fixed_by.items()
        if share is not None
    )
    reasons: dict[str, list[str]] = {}
    for variant, reason in skipped_combinations(sweep.config).items():
        reasons.setdefault(reason, []).append(" ".join(filter(None, variant)))
    left = (f"Not tried: {', '.join(names)}: {reason}." for reason, names in reasons.items())
    return (*decided, *left)


def _limit(sweep: Swept) -> str:
    return _format_drop(sweep, sweep.max_drop.amount) if sweep.max_drop is not None else ""


def _compared(comparison: ScheduleComparison, sweep: Swept) -> str:
    """A sentence on which of two schedules is better here, also where the pairs disagree."""
    ahead, behind = (comparison.right, comparison.left) if comparison.mean >= 0 else (comparison.left, comparison.right)
    sign = 1 if comparison.mean >= 0 else -1
    gains = sorted(sign * gain for gain in comparison.gains)
    wins, losses = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    amount = f"{_format_drop(sweep, abs(comparison.mean))} of {sweep.base.metric} on average"
    pairs = f"in {count(wins)} of {count(len(gains))} {'pair' if len(gains) == 1 else 'pairs'}"
    question = f"{comparison.left} or {comparison.right}:"
    if not wins and not losses:
        return f"{question} no difference in {sweep.base.metric}."
    if not losses:
        same = f", and no worse in {count(len(gains) - wins)}" if wins < len(gains) else ""
        return f"{question} {ahead} is better than {behind} {pairs}{same}, by {amount}."
    span = f"from {_format_drop(sweep, gains[0])} to {_format_drop(sweep, gains[-1])}"
    return f"{question} no clear winner; {ahead} is better {pairs}, by {amount} ({span})."


def _format_drop(sweep: Swept, value: float) -> str:
    """A difference: in percentage points where the metric is a share."""
    return amount(value, sweep.base)
