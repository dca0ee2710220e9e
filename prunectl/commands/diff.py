"""`prunectl diff`: what became of every tensor?"""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import replace
from typing import Annotated, Any

import typer

from prunectl.analysis.patterns import sparsity_maps
from prunectl.analysis.stats import TensorStats
from prunectl.checks.diff import ModelDiff, TensorDiff, diff_models, judge, parse
from prunectl.checks.rules import Finding
from prunectl.commands._command import make_command, resolve_model
from prunectl.errors import UsageError
from prunectl.formats.detect import without_secrets
from prunectl.formats.registry import open_model
from prunectl.reporting.check import describe, table, verdict_sentence
from prunectl.reporting.prune import before_after
from prunectl.reporting.report import Cell, Column, Report, Section, Table, Unit, survey_json
from prunectl.reporting.reporter import Reporter
from prunectl.units import count, percent

_COLUMNS = (
    Column("tensor"),
    Column("was", is_optional=True, title="old name"),
    Column("by", is_optional=True, title="matched by"),
    Column("", title="change"),
    Column("shape", is_optional=True, is_whole=True),
    Column("changed", Unit.RATIO),
    Column("zeros gained", Unit.COUNT),
    Column("zeros lost", Unit.COUNT),
    Column("sparsity", Unit.RATIO),
)


def diff_report(model_diff: ModelDiff, findings: tuple[Finding, ...], *, has_gates: bool) -> Report:
    """The report on two models; gates are for scripts, as people see them in a table."""
    rows = Table("tensors", _COLUMNS, tuple(map(_row, model_diff.changes)))
    changed = Table("tensors", _COLUMNS, tuple(_row(change) for change in model_diff.changes if change.kind != "same"))
    tables = [*([changed] if changed.rows else []), before_after(model_diff.old, model_diff.new)]
    tables += [table(findings)] if findings else []
    failed = [finding for finding in findings if finding.is_failure]
    remarks = tuple(f"{finding.id}: {finding.note}" for finding in failed if finding.note)
    return Report(
        models=(survey_json(model_diff.new), survey_json(model_diff.old)),
        table=rows,
        sections=(Section(f"{model_diff.old.path} -> {model_diff.new.path}", _facts(model_diff), tuple(tables)),),
        notes=(*(() if has_gates else remarks), *_unmatched(model_diff)),
        next_step=_next_step(model_diff),
        log_lines=tuple(f"{finding.verdict}: {verdict_sentence(finding)}" for finding in failed),
        gates=findings if has_gates else (),
        quiet_lines=tuple(f"{finding.verdict}: {describe(finding)}" for finding in failed),
        exit_code_override=int(bool(failed)),
        extra_json={"changes": [_json(change) for change in model_diff.changes], "growth": model_diff.growth},
    )


def _next_step(model_diff: ModelDiff) -> str:
    """To prove that nothing but zeros came, where the tensors are the same ones."""
    new, old = model_diff.new, model_diff.old
    if new.format != old.format or not any(change.zeros_added for change in model_diff.changes):
        return ""
    return shlex.join(["prunectl", "verify", new.path, "--against", old.path])


def _row(change: TensorDiff) -> tuple[Cell, ...]:
    row = change.new or change.old
    assert row is not None
    size = row.params
    share = None if change.changed is None else change.changed / size if size else 0.0
    was = change.old.name if change.old is not None and change.old.name != change.name else ""
    matched_by = change.match_kind if change.old is not None and change.new is not None else ""
    return (
        change.name,
        was,
        matched_by,
        change.kind,
        _shapes(change),
        share,
        change.zeros_added,
        change.zeros_lost,
        row.sparsity,
    )


def _shapes(change: TensorDiff) -> str:
    shapes = dict.fromkeys(_shape(row) for row in (change.old, change.new) if row is not None)
    return " -> ".join(shapes)


def _shape(row: TensorStats) -> str:
    return "x".join(map(str, row.shape)) or "scalar"


def _facts(model_diff: ModelDiff) -> tuple[tuple[str, str], ...]:
    kinds = Counter(change.kind for change in model_diff.changes)
    kinds_text = ", ".join(f"{count(number)} {kind}" for kind, number in kinds.most_common())
    gained, lost = (
        sum(getattr(change, name) or 0 for change in model_diff.changes) for name in ("zeros_added", "zeros_lost")
    )
    facts = [("tensors", kinds_text or "none"), ("zeros", f"{count(gained)} gained, {count(lost)} lost")]
    old = model_diff.old.bytes.compressed
    if old:
        share = model_diff.growth / old
        facts.append(
            ("gzip", f"{percent(abs(share))} {'bigger' if share > 0 else 'smaller'}" if share else "the same size")
        )
    return tuple(facts)


def _unmatched(model_diff: ModelDiff) -> tuple[str, ...]:
    """Say where a name may have changed without anybody being able to tell."""
    kinds = Counter(change.kind for change in model_diff.changes)
    if not kinds["added"] or not kinds["gone"]:
        return ()
    return ("Some of the added and removed tensors may be the same under new names: prunectl does not guess.",)


def _json(change: TensorDiff) -> dict[str, Any]:
    counts = {
        "how": change.match_kind,
        "changed": change.changed,
        "gained": change.zeros_added,
        "lost": change.zeros_lost,
    }
    return {"name": change.name, "kind": change.kind, "new": _tensor(change.new), "old": _tensor(change.old), **counts}


def _tensor(row: TensorStats | None) -> dict[str, Any] | None:
    if row is None:
        return None
    numbers = {"params": row.params, "zeros": row.zeros, "bytes": row.bytes}
    return {"name": row.name, "shape": list(row.shape), "dtype": row.dtype, **numbers}


def diff(
    ctx: typer.Context,
    new: Annotated[str, typer.Argument(metavar="NEW", help="New model; - reads standard input.")],
    old: Annotated[str, typer.Argument(metavar="OLD", help="Old model to compare with; may be in another format.")],
    *,
    fail_on: Annotated[
        str,
        typer.Option(
            metavar="WHAT", help="Exit code 1 on growth:2%, nonzero, shape, dtype or changed; comma-separated."
        ),
    ] = "",
) -> int:
    """Compare two models tensor by tensor: tensors added, removed or changed, zeros, sizes.

    Tensors are matched by name; across formats by layer and shape, with axes transposed where only one way fits.

    [dim]$[/] prunectl diff sparse.h5 model.h5

    [dim]$[/] prunectl diff model.onnx model.pt

    [dim]$[/] prunectl diff sparse.h5 model.h5 --fail-on growth:2%,nonzero,shape

    --fail-on takes growth:2% or growth:10KB (compressed size), nonzero (a pruned weight is no longer zero), shape (a
    tensor was added, removed or resized), dtype, and changed (any number differs).
    """
    reporter: Reporter = ctx.obj
    rules = parse(fail_on)
    if new == old == "-":
        raise UsageError(
            "only one of the two models can come from standard input", hint="write prunectl diff - OLD < NEW"
        )
    with resolve_model(new, reporter.note) as new_path, resolve_model(old, reporter.note) as old_path:
        new, old = without_secrets(new), without_secrets(old)
        models = (open_model(new_path), open_model(old_path))
        model_diff = diff_models(*models, reporter.progress)
        # Only a page has pictures.
        pairs = (
            zip((new, old), models, (model_diff.new, model_diff.old), strict=True) if reporter.html is not None else ()
        )
        maps = {name: sparsity_maps(model, stats) for name, model, stats in pairs}
    model_diff = replace(model_diff, new=replace(model_diff.new, path=new), old=replace(model_diff.old, path=old))
    report = diff_report(model_diff, judge(model_diff, rules), has_gates=reporter.is_json)
    return reporter.show(replace(report, sparsity_maps=maps))


command = make_command(diff)
