"""`prunectl diff`: what became of every tensor?"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Annotated, Any

import typer

from prunectl.analysis.sparsity_map import sparsity_maps
from prunectl.analysis.stats import TensorStats
from prunectl.checks.diff import ModelDiff, TensorDiff, difference, judge, parse
from prunectl.checks.parse import Words
from prunectl.checks.rules import Finding
from prunectl.commands._command import make_command, resolve_stdin
from prunectl.errors import UsageError
from prunectl.formats.registry import open_model
from prunectl.reporting.checks.text import CheckReport, describe, table
from prunectl.reporting.prune import before_after
from prunectl.reporting.report import Cell, Column, Report, Section, Table, Unit
from prunectl.reporting.reporter import Reporter
from prunectl.reporting.serialize import survey_json
from prunectl.units import count, parse_ratio, parse_size, percent

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


def diff_report(found: ModelDiff, findings: tuple[Finding, ...], *, has_gates: bool) -> Report:
    """Return the report on two models; gates are for scripts, as people see them in a table."""
    rows = Table("tensors", _COLUMNS, tuple(map(_row, found.changes)))
    news = Table("tensors", _COLUMNS, tuple(_row(change) for change in found.changes if change.kind != "same"))
    tables = [*([news] if news.rows else []), before_after(found.old, found.new)]
    tables += [table(findings)] if findings else []
    failed = [finding for finding in findings if finding.is_failure]
    told = tuple(f"{finding.verdict}: {describe(finding)}" for finding in failed)
    return CheckReport(
        models=(survey_json(found.new), survey_json(found.old)),
        main=rows,
        sections=(Section(f"{found.old.path} -> {found.new.path}", _facts(found), tuple(tables)),),
        remarks=(*(() if has_gates else told), *_unmatched(found)),
        gates=findings if has_gates else (),
        bare=told,
        code=int(bool(failed)),
        more={"changes": [_json(change) for change in found.changes], "growth": found.growth},
    )


def _row(change: TensorDiff) -> tuple[Cell, ...]:
    row = change.new or change.old
    assert row is not None
    size = row.params
    share = None if change.changed is None else change.changed / size if size else 0.0
    was = change.old.name if change.old is not None and change.old.name != change.name else ""
    how = change.how if change.old is not None and change.new is not None else ""
    return (change.name, was, how, change.kind, _shapes(change), share, change.gained, change.lost, row.sparsity)


def _shapes(change: TensorDiff) -> str:
    shapes = dict.fromkeys(_shape(row) for row in (change.old, change.new) if row is not None)
    return " -> ".join(shapes)


def _shape(row: TensorStats) -> str:
    return "x".join(map(str, row.shape)) or "scalar"


def _facts(found: ModelDiff) -> tuple[tuple[str, str], ...]:
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


def _unmatched(found: ModelDiff) -> tuple[str, ...]:
    """Say where a name may have changed without anybody being able to tell."""
    kinds = Counter(change.kind for change in found.changes)
    if not kinds["added"] or not kinds["gone"]:
        return ()
    return ("What is added and what is gone may be the same under other names: nothing was guessed.",)


def _json(change: TensorDiff) -> dict[str, Any]:
    said = {"how": change.how, "changed": change.changed, "gained": change.gained, "lost": change.lost}
    return {"name": change.name, "kind": change.kind, "new": _tensor(change.new), "old": _tensor(change.old), **said}


def _tensor(row: TensorStats | None) -> dict[str, Any] | None:
    if row is None:
        return None
    numbers = {"params": row.params, "zeros": row.zeros, "bytes": row.bytes}
    return {"name": row.name, "shape": list(row.shape), "dtype": row.dtype, **numbers}


def diff(
    ctx: typer.Context,
    new: Annotated[str, typer.Argument(metavar="NEW", help="File or folder; - is standard input.")],
    old: Annotated[str, typer.Argument(metavar="OLD", help="What it was; also in another format.")],
    *,
    fail_on: Annotated[
        str, typer.Option(metavar="WHAT", help="Exit code 1 for growth:2%, nonzero, shape, dtype or changed.")
    ] = "",
) -> int:
    """Compare two models tensor by tensor: what is new, gone or changed, zeros that came and went, sizes.

    Tensors are the same by name; across formats by layer and shape, with axes moved where only one way is possible.
    nonzero means a zero of a prunable weight that is none any more.

    [dim]$[/] prunectl diff sparse.h5 model.h5

    [dim]$[/] prunectl diff model.onnx model.pt

    [dim]$[/] prunectl diff sparse.h5 model.h5 --fail-on growth:2%,nonzero,shape
    """
    reporter: Reporter = ctx.obj
    forbidden = parse(fail_on, Words(parse_size, parse_ratio))
    if new == old == "-":
        raise UsageError("standard input holds one model", hint="prunectl diff - OLD < NEW")
    with resolve_stdin(new) as path, resolve_stdin(old) as other:
        models = (open_model(path), open_model(other))
        found = difference(*models, reporter.progress)
        # Only a page has pictures.
        pairs = zip((new, old), models, (found.new, found.old), strict=True) if reporter.html is not None else ()
        masks = {name: sparsity_maps(model, survey) for name, model, survey in pairs}
    found = replace(found, new=replace(found.new, path=new), old=replace(found.old, path=old))
    report = diff_report(found, judge(found, forbidden), has_gates=reporter.is_json)
    return reporter.show(replace(report, masks=masks))


command = make_command(diff)
