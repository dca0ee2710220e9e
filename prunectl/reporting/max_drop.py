"""What `--max-drop` says: how much goes, what it costs, and what else was tried."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from prunectl.analysis.patterns import CHANNEL
from prunectl.analysis.stats import ModelStats
from prunectl.reporting.prune import before_after
from prunectl.reporting.report import Artifact, Cell, Column, Report, Section, Table, Unit
from prunectl.reporting.serialize import survey_json
from prunectl.sweeping.bisection import amount, drop, finite
from prunectl.sweeping.max_drop import SearchResult
from prunectl.sweeping.trial import Trial
from prunectl.units import count, percent


def with_search(report: Report, held: SearchResult, judged_by: str, *, does_look: bool) -> Report:
    """Return the report on pruning at the sparsity that was found, with how it was found."""
    remarks = (
        (f"Judged by {judged_by}, which the strategy looks at too: other data may say less.",) if does_look else ()
    )
    return replace(
        report, sections=(_section(held, remarks), *report.sections), more={**report.more, "max_drop": _json(held)}
    )


def max_drop_report(
    held: SearchResult, surveys: tuple[ModelStats, ModelStats], model: str, output: str, remarks: tuple[str, ...]
) -> Report:
    """Return the report on a search whose result is one of the models that were tried, with what it was before."""
    before, after = surveys
    section = _section(held, (*remarks, f"Next: prunectl size {output}"))
    return Report(
        models=(survey_json(before), survey_json(after)),
        main=_result(held, surveys, output),
        sections=(Section(f"{model} -> {output}", tables=(before_after(before, after),)), section),
        artifacts=(Artifact(output, after.bytes.raw),),
        bare=(),
        more={"max_drop": _json(held)},
    )


def _section(held: SearchResult, remarks: tuple[str, ...]) -> Section:
    base, best = held.base, held.outcome
    lost = amount(drop(best, base), base)
    facts = (
        (base.metric, f"{base.value:.4g} -> {best.value:.4g}, a drop of {lost}; {held.limit.shown} is allowed"),
        ("tried", f"{count(len(held.tried))} {'sparsity' if len(held.tried) == 1 else 'sparsities'}"),
    )
    notes = tuple(dict.fromkeys((*_found(held), *held.again, *base.notes, *_diverged(held), *best.notes)))
    return Section(f"within a drop of {held.limit.shown}", facts, (_trials_table(held),), (*notes, *remarks))


def _found(held: SearchResult) -> tuple[str, ...]:
    """Say which sparsity holds: the one that the file has, where it is not what was asked for."""
    base, best = held.base, held.outcome
    asked, worth = percent(held.best.sparsity), f"{base.metric} is {best.value:.4g}"
    alike = [point for point, outcome in held.tried.items() if outcome.digest and outcome.digest == best.digest]
    first = min((point.sparsity for point in alike), default=held.best.sparsity)
    if first == held.best.sparsity:
        return (f"The largest sparsity that holds is {asked}: {worth}.{_zeros(held)}",)
    same = f"From {percent(first)} to {asked} the file is the same, so that more cannot go: {worth}."
    return (f"{same}{_zeros(held)} What layers and limits of their own say goes before what is asked.",)


def _zeros(held: SearchResult) -> str:
    """Say how sparse the file is; channels that were cut have left no zeros."""
    if held.best.pattern == CHANNEL:
        return ""
    return f" Of all parameters, {percent(held.outcome.sparsity)} are zero."


def _diverged(held: SearchResult) -> tuple[str, ...]:
    """Say why there is no model of a sparsity."""
    return tuple(note for outcome in held.tried.values() if not outcome.path for note in outcome.notes)


def _outcome(held: SearchResult, point: Trial) -> str:
    if not held.tried[point].is_number:
        return "no number" if held.tried[point].path else "went astray"
    return "holds" if held.is_held(point) else "too much"


def _trials_table(held: SearchResult) -> Table:
    columns = (
        Column("asked", Unit.RATIO),
        Column("sparsity", Unit.RATIO, is_optional=True),
        Column(held.base.metric, Unit.NUMBER),
        Column("drop", Unit.NUMBER),
        Column("gzip", Unit.BYTES),
        Column("verdict"),
    )
    rows: list[tuple[Cell, ...]] = [
        (
            point.sparsity,
            outcome.sparsity if outcome.path else None,
            finite(outcome.value),
            finite(drop(outcome, held.base)),
            outcome.gzip if outcome.path else None,
            _outcome(held, point),
        )
        for point, outcome in held.tried.items()
    ]
    return Table("tried", columns, tuple(rows))


def _result(held: SearchResult, surveys: tuple[ModelStats, ModelStats], output: str) -> Table:
    columns = (
        Column("model"),
        Column("metric"),
        Column("before", Unit.NUMBER),
        Column("after", Unit.NUMBER),
        Column("asked", Unit.RATIO),
        Column("sparsity", Unit.RATIO),
        Column("gzip before", Unit.BYTES),
        Column("gzip after", Unit.BYTES),
        Column("tried", Unit.COUNT),
    )
    base, best, (before, after) = held.base, held.outcome, surveys
    row: tuple[Cell, ...] = (
        *(output, base.metric, base.value, best.value, held.best.sparsity, after.sparsity),
        *(before.bytes.compressed, after.bytes.compressed, len(held.tried)),
    )
    return Table("result", columns, (row,))


def _json(held: SearchResult) -> dict[str, Any]:
    base, best = held.base, held.outcome
    return {
        "limit": held.limit.amount,
        "metric": base.metric,
        "before": base.value,
        "after": best.value,
        "drop": drop(best, base),
        "sparsity": held.best.sparsity,
        "tried": [
            {
                "sparsity": point.sparsity,
                "value": finite(outcome.value),
                "drop": finite(drop(outcome, base)),
                "gzip": outcome.gzip if outcome.path else None,
                "is_held": held.is_held(point),
            }
            for point, outcome in held.tried.items()
        ],
    }
