"""Reports for programs and documents: JSON, tab-separated rows, CSV, Markdown."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, fields
from typing import Any

from prunectl import __version__
from prunectl.analysis.stats import ModelStats, TensorStats
from prunectl.errors import PrunectlError
from prunectl.reporting.report import Report, Table
from prunectl.units import Units


def plain(table: Table) -> str:
    """Tab-separated rows without a head, for `cut` and `awk`."""
    return "".join("\t".join(table.raw_row(row)) + "\n" for row in table.rows)


def comma_separated(table: Table) -> str:
    """CSV with a head, in which no text is a formula."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    head = [column.name for column in table.columns]
    writer.writerows(map(_without_formula, cells) for cells in (head, *map(table.raw_row, table.rows)))
    return text.getvalue()


def _without_formula(cell: str) -> str:
    """A cell with an apostrophe before it where a spreadsheet would calculate it, as OWASP advises.

    Tabs and carriage returns, which can begin a formula too, are escaped in every cell.
    """
    if len(cell) < len("=A") or cell[0] not in "=+-@":
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


def markdown(table: Table, units: Units) -> str:
    """A Markdown table, its numbers as people read them."""
    lines = [
        [column.name for column in table.columns],
        ["---:" if column.is_number else "---" for column in table.columns],
    ]
    for row in (*table.rows, *([table.total] if table.total else [])):
        lines.append([column.format(cell, units) for column, cell in zip(table.columns, row, strict=True)])
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


SCHEMA = "prunectl.report/1"


def report_json(report: Report, command: str) -> str:
    """The JSON document of a report."""
    failed = [{"path": failure.path, "error": error_json(failure.error)} for failure in report.failures]
    worst = max(report.failures, key=lambda failure: failure.error.exit_code, default=None)
    return _document(
        command,
        report.exit_code,
        models=[*report.models, *failed],
        gates=[asdict(gate) for gate in report.gates],
        artifacts=[asdict(artifact) for artifact in report.artifacts],
        warnings=list(report.notes),
        error=error_json(worst.error) if worst else None,
        **report.extra_json,
    )


def failure_json(error: PrunectlError, command: str) -> str:
    """The JSON document of a command that failed as a whole."""
    return _document(command, error.exit_code, models=[], gates=[], artifacts=[], warnings=[], error=error_json(error))


def error_json(error: PrunectlError) -> dict[str, Any]:
    """An error as scripts read it."""
    return {
        "code": error.exit_code,
        "kind": error.kind,
        "message": error.message,
        "hint": error.hint,
        "did_you_mean": list(error.did_you_mean),
    }


def _document(command: str, exit_code: int, **parts: Any) -> str:
    document = {
        "schema": SCHEMA,
        "tool": {"name": "prunectl", "version": __version__},
        "command": command,
        "ok": exit_code == 0,
        "exit_code": exit_code,
        **parts,
    }
    return json.dumps(document, indent=2, sort_keys=True, allow_nan=False) + "\n"


_FACTS = tuple(field.name for field in fields(TensorStats))


def survey_json(stats: ModelStats) -> dict[str, Any]:
    """A model in a JSON document: integers for bytes and counts, ratios from 0 to 1."""
    about = stats.about
    return {
        "path": stats.path,
        "format": stats.format,
        "sha256": stats.sha256,
        "bytes": asdict(stats.bytes),
        "params": asdict(stats.params),
        "sparsity": stats.sparsity,
        "prunable_sparsity": stats.prunable_sparsity,
        "parts": [asdict(part) for part in stats.parts],
        "layers": [_layer(row) for row in stats.layers],
        "about": {
            "producer": about.producer,
            "wrappers": [asdict(wrapper) for wrapper in about.wrappers],
            "optimizer": about.optimizer,
            "training": list(about.training),
            "code": list(about.code),
            "notes": list(about.notes),
            "is_compressed": about.is_compressed,
        },
        "pattern": stats.pattern or None,
        "macs": stats.macs,
        "macs_unknown": list(stats.macs_unknown),
        "histogram": asdict(stats.histogram) if stats.histogram else None,
        "advice": list(stats.advice),
    }


def _layer(row: TensorStats) -> dict[str, Any]:
    # Not by asdict, which copies each value deeply: a model may have a hundred thousand tensors.
    facts = {name: getattr(row, name) for name in _FACTS}
    return {**facts, "shape": list(row.shape), "sparsity": row.sparsity, "tied_to": row.tied_to or None}
