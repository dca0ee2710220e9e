"""The page: what a report says to people, and pictures of what it says to scripts."""

from __future__ import annotations

import base64
import hashlib
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import count as numbers
from pathlib import Path

from prunectl import __version__
from prunectl.analysis.patterns import SparsityMap
from prunectl.analysis.sizes import LimitCheck, gate_sentence
from prunectl.errors import UsageError
from prunectl.formats import atomic
from prunectl.reporting.html.charts import bars, curves, draw_sparsity_maps, escape, pareto, tag, treemap
from prunectl.reporting.report import Cell, Column, Failure, Report, Section, Table
from prunectl.units import Units

_FILTERED_FROM = 9
"""Tables from this number of rows on have a filter."""


def table_html(table: Table, identity: str, units: Units) -> str:
    """A table with the rows of the report, in their order until a heading is clicked."""
    table = _without_empty(table)
    heads = "".join(_head(column) for column in table.columns)
    rows = "".join(_row(table, row, units) for row in table.rows)
    foot = f"<tfoot>{_row(table, table.total, units)}</tfoot>" if table.total else ""
    inside = f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody>{foot}"
    name = escape(table.title or table.name)
    element = f'<table class="sortable" id="{identity}" aria-label="{name}">{inside}</table>'
    around = f'<div class="scroll" tabindex="0" role="group" aria-label="{name}">{element}</div>'
    return f"{_filter(table, identity, name)}{around}"


def _without_empty(table: Table) -> Table:
    """The table without optional columns that are empty."""
    shown = [
        place
        for place, column in enumerate(table.columns)
        if not column.is_optional
        or any(row[place] not in {"", None} for row in (*table.rows, table.total or ()) if row)
    ]
    rows = tuple(tuple(row[place] for place in shown) for row in table.rows)
    total = tuple(table.total[place] for place in shown) if table.total else table.total
    return replace(table, columns=tuple(table.columns[place] for place in shown), cells=rows, total=total)


def _filter(table: Table, identity: str, name: str) -> str:
    if len(table.rows) < _FILTERED_FROM:
        return ""
    field = f'<input type="search" placeholder="filter" aria-label="filter {name}" data-table="{identity}">'
    return f'<div>{field}<output aria-live="polite"></output></div>'


def _head(column: Column) -> str:
    if not column.heading:
        return "<td></td>"
    button = tag("button", escape(column.heading), type="button")
    return f'<th scope="col" aria-sort="none"{_css_class(column)}>{button}</th>'


def _row(table: Table, row: tuple[Cell, ...], units: Units) -> str:
    return f"<tr>{''.join(_cell(column, cell, units) for column, cell in zip(table.columns, row, strict=True))}</tr>"


def _cell(column: Column, cell: Cell, units: Units) -> str:
    formatted = escape(column.format(cell, units))
    if not column.is_number:
        return f"<td{_VERDICTS.get(str(cell), '') if column.name == 'verdict' else ''}>{formatted}</td>"
    value = "" if cell is None or isinstance(cell, str) else f"{cell:.6g}" if isinstance(cell, float) else str(cell)
    return f'<td class="n" data-v="{value}">{formatted}</td>'


_VERDICTS = {"pass": ' class="good"', "FAIL": ' class="bad"', "warn": ' class="warn"'}


def _css_class(column: Column) -> str:
    return ' class="n"' if column.is_number else ""


_FAILED = {1: "A limit is exceeded"}
GENERATOR_TAG = '<meta name="generator" content="prunectl">'
"""The tag by which a page of prunectl is recognised."""
PLOT = "plot"
"""The name of the table that plots the trials of a sweep."""


def page(report: Report, command: str, units: Units, command_line: str = "") -> str:
    """Render a report as a self-contained HTML file, with the command line at its end."""
    title = f"prunectl {command}"
    rules = (
        f"default-src 'none'; style-src {_hash(_STYLE)}; script-src {_hash(_SCRIPT)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    head = (
        f'<meta charset="utf-8">{GENERATOR_TAG}<meta http-equiv="Content-Security-Policy" content="{rules}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style>"
    )
    verdict = (
        '<p class="good">Finished without errors</p>'
        if report.exit_code == 0
        else f'<p class="bad">{_FAILED.get(report.exit_code, "Failed")} (exit code {report.exit_code})</p>'
    )
    body = (
        f"<main><h1>{escape(title)}</h1>{verdict}{_failures(report.failures)}{_gates(report, units)}"
        f"{_notes(report.notes)}{_plots(report, units)}{_models(report, units)}{_sections(report, units)}</main>"
        f"<footer>{_origin(command_line)}</footer><script>{_SCRIPT}</script>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def _origin(command_line: str) -> str:
    """The version and the day of a page; SOURCE_DATE_EPOCH gives the day for reproducible builds."""
    seconds = os.environ.get("SOURCE_DATE_EPOCH", "")
    day = datetime.fromtimestamp(int(seconds) if seconds.isdecimal() else time.time(), UTC).date()
    command = f"<code>{escape(command_line)}</code><br>" if command_line else ""
    return f"{command}prunectl {escape(__version__)}, {day}"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _failures(failures: Iterable[Failure]) -> str:
    return "".join(
        f'<p class="bad">{escape(failure.path)}: {escape(failure.error.message)}</p><p>{escape(failure.error.hint)}</p>'
        for failure in failures
    )


def _gates(report: Report, units: Units) -> str:
    # Findings have a table of their own, with more detail than the gates.
    gates = [gate for gate in report.gates if type(gate) is LimitCheck]
    return "".join(
        f'<p class="{"good" if gate.ok else "bad"}">{"pass" if gate.ok else "FAIL"}: '
        f"{escape(gate_sentence(gate, units))}</p>"
        for gate in gates
    )


def _notes(notes: Sequence[str]) -> str:
    return f'<ul class="remarks">{"".join(tag("li", escape(text)) for text in notes)}</ul>' if notes else ""


def _plots(report: Report, units: Units) -> str:
    plot = pareto(report.models, units)
    return (f"<h2>Pareto front</h2>{plot}" if plot else "") + curves(report)


def _sections(report: Report, units: Units) -> str:
    has_plot = any("point" in model for model in report.models)
    sections = report.sections or (Section("", tables=(report.table,)),)
    number = numbers()
    return "".join(_section(section, units, number, has_plot=has_plot) for section in sections)


def _section(section: Section, units: Units, number: Iterable[int], *, has_plot: bool) -> str:
    # Plots in characters for a terminal are pictures here.
    shown = [table for table in section.tables if not (has_plot and table.name == PLOT)]
    facts = "".join(f"{tag('dt', escape(name))}{tag('dd', escape(value))}" for name, value in section.facts)
    drawing = tag("pre", "\n".join(map(escape, section.drawing))) if section.drawing else ""
    tables = "".join(
        f"{tag('h3', escape(table.title or table.name))}{table_html(table, f't{identity}', units)}"
        for table, identity in zip(shown, number, strict=False)
        if table.rows or table.total
    )
    inside = f"{tag('dl', facts) if facts else ''}{drawing}{tables}{_notes(section.notes)}"
    return f"{tag('h2', escape(section.title)) if section.title else ''}{inside}" if inside else ""


def _models(report: Report, units: Units) -> str:
    """The pictures of each model; those of several models are side by side where there is room."""
    pictures = "".join(
        _model(model, report.sparsity_maps.get(str(model["path"]), ()), units)
        for model in report.models
        if model.get("layers")
    )
    return f'<div class="models">{pictures}</div>' if pictures else ""


def _model(model: dict[str, object], maps: Sequence[SparsityMap], units: Units) -> str:
    layers = model["layers"]
    assert isinstance(layers, Sequence)
    parts = (
        ("size by tensor", treemap(layers, units)),
        ("sparsity by tensor", bars(layers)),
        ("maps of zeros", draw_sparsity_maps(maps)),
    )
    pictures = "".join(f"<h3>{title}</h3>{picture}" for title, picture in parts if picture)
    return f"<section>{tag('h2', escape(str(model['path'])))}{pictures}</section>" if pictures else ""


_HEAD_BYTES = 512


def check(path: Path) -> None:
    """Refuse a path to which no page can be written, before any work begins."""
    atomic.check_beside(path)
    if path.is_dir():
        raise UsageError(f"{path} is a folder", hint=f"name a file: --html {path / 'report.html'}")
    if path.is_file() and not _is_ours(path):
        raise UsageError(f"{path} exists and is not a prunectl report", hint="choose another file, or remove this one")


def write(path: Path, report: Report, command: str, units: Units, command_line: str = "") -> int:
    """Write a report as a page, and return its bytes."""
    # A file that the command itself has written there meanwhile is not replaced.
    check(path)
    text = page(report, command, units, command_line)
    atomic.write_text(path, text, is_forced=True)
    return len(text.encode())


def _is_ours(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    return not head or GENERATOR_TAG.encode() in head


def _beside(name: str) -> str:
    return "\n" + Path(__file__).with_name(name).read_text(encoding="utf-8")


_SCRIPT = _beside("page.js")
"""The script of the page: it sorts a table by a column, and shows the rows that contain a word."""
_STYLE = _beside("page.css")
