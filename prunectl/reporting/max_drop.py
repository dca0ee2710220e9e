"""What `--max-drop` says: how much goes, what it costs, and what else was tried."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import Any

from prunectl.analysis.patterns import CHANNEL
from prunectl.analysis.stats import ModelStats
from prunectl.reporting.prune import LIKELY_TO_FALL, UNMEASURED, before_after, compare_sizes, outcome
from prunectl.reporting.report import Artifact, Cell, Column, Report, Section, Table, Unit, survey_json
from prunectl.sweeping.grid import amount, drop, finite
from prunectl.sweeping.sweep import SearchResult
from prunectl.sweeping.trial import Trial
from prunectl.units import count, percent


def _is_still_true(note: str) -> bool:
    """Whether a note is true for a result whose accuracy was measured."""
    return note != UNMEASURED and LIKELY_TO_FALL not in note


def with_search(report: Report, result: SearchResult, judged_by: str, *, looks_at_data: bool) -> Report:
    """The report on pruning at the sparsity that was found, with the search."""
    notes = (
        (f"The drop was measured on {judged_by}, which the strategy also used: it may be larger on other data.",)
        if looks_at_data
        else ()
    )
    sections = tuple(
        replace(section, notes=tuple(filter(_is_still_true, section.notes))) for section in report.sections
    )
    return replace(
        report,
        sections=(_section(result, notes), *sections),
        next_step="".join(shlex.join(["prunectl", "size", artifact.path]) for artifact in report.artifacts[:1]),
        extra_json={**report.extra_json, "max_drop": _json(result)},
    )


def max_drop_report(
    result: SearchResult, surveys: tuple[ModelStats, ModelStats], model: str, output: str, notes: tuple[str, ...]
) -> Report:
    """The report on a search whose result is one of its trials, with sizes before and after."""
    before, after = surveys
    section = _section(result, notes)
    return Report(
        models=(survey_json(before), survey_json(after)),
        table=_result(result, surveys, output),
        sections=(Section(f"{model} -> {output}", tables=(before_after(before, after),)), section),
        artifacts=(Artifact(output, after.bytes.raw),),
        summary=outcome(before, after, output),
        next_step=compare_sizes(before, output),
        quiet_lines=(),
        extra_json={"max_drop": _json(result)},
    )


def _section(result: SearchResult, notes: tuple[str, ...]) -> Section:
    base, best = result.base, result.result
    lost = amount(drop(best, base), base)
    facts = (
        (base.metric, f"{base.value:.4g} -> {best.value:.4g}, a drop of {lost} (limit: {result.limit.shown})"),
        ("tried", f"{count(len(result.tried))} {'sparsity' if len(result.tried) == 1 else 'sparsities'}"),
    )
    search_notes = tuple(
        dict.fromkeys((*_largest_sparsity(result), *result.rerun_notes, *base.notes, *_diverged(result), *best.notes))
    )
    return Section(
        f"largest sparsity with a drop of at most {result.limit.shown}",
        facts,
        (_trials_table(result),),
        (*search_notes, *notes),
    )


def _largest_sparsity(result: SearchResult) -> tuple[str, ...]:
    """A sentence on the largest sparsity within the limit, also where higher ones give the same file."""
    base, best = result.base, result.result
    sparsity, worth = percent(result.best.sparsity), f"{base.metric} is {best.value:.4g}"
    alike = [point for point, outcome in result.tried.items() if outcome.digest and outcome.digest == best.digest]
    first = min((point.sparsity for point in alike), default=result.best.sparsity)
    if first == result.best.sparsity:
        return (f"The largest sparsity within the limit is {sparsity}: {worth}.{_zeros(result)}",)
    same = f"The file is the same from {percent(first)} to {sparsity}, so no more can be pruned: {worth}."
    return (f"{same}{_zeros(result)} Ratios and limits of single layers take precedence over the sparsity.",)


def _zeros(result: SearchResult) -> str:
    """The sparsity of the file; empty for a channel cut, which leaves no zeros."""
    if result.best.pattern == CHANNEL:
        return ""
    return f" The sparsity of all parameters is {percent(result.result.sparsity)}."


def _diverged(result: SearchResult) -> tuple[str, ...]:
    """A sentence on trials that diverged, for which there is no model."""
    return tuple(note for outcome in result.tried.values() if not outcome.path for note in outcome.notes)


def _outcome(result: SearchResult, point: Trial) -> str:
    if not result.tried[point].is_number:
        return "NaN" if result.tried[point].path else "diverged"
    return "within limit" if result.within_limit(point) else "over limit"


def _trials_table(result: SearchResult) -> Table:
    columns = (
        Column("target", Unit.RATIO),
        Column("sparsity", Unit.RATIO, is_optional=True),
        Column(result.base.metric, Unit.NUMBER),
        Column("drop", Unit.NUMBER),
        Column("gzip", Unit.BYTES),
        Column("verdict"),
    )
    rows: list[tuple[Cell, ...]] = [
        (
            point.sparsity,
            outcome.sparsity if outcome.path else None,
            finite(outcome.value),
            finite(drop(outcome, result.base)),
            outcome.gzip if outcome.path else None,
            _outcome(result, point),
        )
        for point, outcome in result.tried.items()
    ]
    return Table("tried", columns, tuple(rows))


def _result(result: SearchResult, surveys: tuple[ModelStats, ModelStats], output: str) -> Table:
    columns = (
        Column("model"),
        Column("metric"),
        Column("before", Unit.NUMBER),
        Column("after", Unit.NUMBER),
        Column("asked", Unit.RATIO, title="target"),
        Column("sparsity", Unit.RATIO),
        Column("gzip before", Unit.BYTES),
        Column("gzip after", Unit.BYTES),
        Column("tried", Unit.COUNT),
    )
    base, best, (before, after) = result.base, result.result, surveys
    row: tuple[Cell, ...] = (
        *(output, base.metric, base.value, best.value, result.best.sparsity, after.sparsity),
        *(before.bytes.compressed, after.bytes.compressed, len(result.tried)),
    )
    return Table("result", columns, (row,))


def _json(result: SearchResult) -> dict[str, Any]:
    base, best = result.base, result.result
    return {
        "limit": result.limit.amount,
        "metric": base.metric,
        "before": base.value,
        "after": best.value,
        "drop": drop(best, base),
        "sparsity": result.best.sparsity,
        "tried": [
            {
                "sparsity": point.sparsity,
                "value": finite(outcome.value),
                "drop": finite(drop(outcome, base)),
                "gzip": outcome.gzip if outcome.path else None,
                "is_held": result.within_limit(point),
            }
            for point, outcome in result.tried.items()
        ],
    }
