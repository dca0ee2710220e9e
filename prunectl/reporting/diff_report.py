"""What `diff` says, drawn from what became of every tensor."""

from __future__ import annotations

from collections import Counter
from typing import Any

from prunectl.gating.difference import Change, Difference
from prunectl.gating.finding import Finding
from prunectl.measuring.survey import LayerRow
from prunectl.reporting.before_after import before_after
from prunectl.reporting.check_report import Judged, table
from prunectl.reporting.gates.words import sentence
from prunectl.reporting.report import Report, Section
from prunectl.reporting.survey_json import survey_json
from prunectl.reporting.table import Cell, Column, Table, Unit
from prunectl.units import count, percent

_COLUMNS = (
    Column("tensor"),
    Column("was", is_optional=True),
    Column("by", is_optional=True),
    Column(""),
    Column("shape"),
    Column("changed", Unit.RATIO),
    Column("zeros gained", Unit.COUNT),
    Column("zeros lost", Unit.COUNT),
    Column("sparsity", Unit.RATIO),
)


def diff_report(found: Difference, findings: tuple[Finding, ...], *, has_gates: bool) -> Report:
    """Return the report on two models; gates are for scripts, as people see them in a table."""
    rows = Table("tensors", _COLUMNS, tuple(map(_row, found.changes)))
    news = Table("tensors", _COLUMNS, tuple(_row(change) for change in found.changes if change.kind != "same"))
    tables = [*([news] if news.rows else []), before_after(found.old, found.new)]
    tables += [table(findings)] if findings else []
    failed = [finding for finding in findings if finding.is_failure]
    told = tuple(f"{finding.verdict}: {sentence(finding)}" for finding in failed)
    return Judged(
        models=(survey_json(found.new), survey_json(found.old)),
        main=rows,
        sections=(Section(f"{found.old.path} -> {found.new.path}", _facts(found), tuple(tables)),),
        remarks=(*(() if has_gates else told), *_unmatched(found)),
        gates=findings if has_gates else (),
        bare=told,
        code=int(bool(failed)),
        more={"changes": [_json(change) for change in found.changes], "growth": found.growth},
    )


def _row(change: Change) -> tuple[Cell, ...]:
    row = change.new or change.old
    assert row is not None
    size = row.params
    share = None if change.changed is None else change.changed / size if size else 0.0
    was = change.old.name if change.old is not None and change.old.name != change.name else ""
    how = change.how if change.old is not None and change.new is not None else ""
    return (change.name, was, how, change.kind, _shapes(change), share, change.gained, change.lost, row.sparsity)


def _shapes(change: Change) -> str:
    shapes = dict.fromkeys(_shape(row) for row in (change.old, change.new) if row is not None)
    return " -> ".join(shapes)


def _shape(row: LayerRow) -> str:
    return "x".join(map(str, row.shape)) or "scalar"


def _facts(found: Difference) -> tuple[tuple[str, str], ...]:
    kinds = Counter(change.kind for change in found.changes)
    told = ", ".join(f"{count(number)} {kind}" for kind, number in kinds.most_common())
    gained, lost = (sum(getattr(change, name) or 0 for change in found.changes) for name in ("gained", "lost"))
    facts = [("tensors", told or "none"), ("zeros", f"{count(gained)} gained, {count(lost)} lost")]
    old = found.old.bytes.compressed
    if old:
        share = found.growth / old
        facts.append(
            ("gzip", f"{percent(abs(share))} {'bigger' if share > 0 else 'smaller'}" if share else "the same size")
        )
    return tuple(facts)


def _unmatched(found: Difference) -> tuple[str, ...]:
    """Say where a name may have changed without anybody being able to tell."""
    kinds = Counter(change.kind for change in found.changes)
    if not kinds["added"] or not kinds["gone"]:
        return ()
    return ("What is added and what is gone may be the same under other names: nothing was guessed.",)


def _json(change: Change) -> dict[str, Any]:
    said = {"how": change.how, "changed": change.changed, "gained": change.gained, "lost": change.lost}
    return {"name": change.name, "kind": change.kind, "new": _tensor(change.new), "old": _tensor(change.old), **said}


def _tensor(row: LayerRow | None) -> dict[str, Any] | None:
    if row is None:
        return None
    numbers = {"params": row.params, "zeros": row.zeros, "bytes": row.bytes}
    return {"name": row.name, "shape": list(row.shape), "dtype": row.dtype, **numbers}
