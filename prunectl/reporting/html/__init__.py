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
"""Rows that are seen at a glance need no filter."""


def table_html(table: Table, identity: str, units: Units) -> str:
    """A table; its rows are those of the report, in that order until somebody clicks."""
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
    """The table without the columns that may go and tell nothing."""
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
"""By which one of our pages is known again."""
PLOT = "plot"
"""The name of a table that draws the points of a sweep."""


def page(report: Report, command: str, units: Units, typed: str = "") -> str:
    """Render a report as a self-contained HTML file, with what was typed for it at its end."""
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
        f"<footer>{_origin(typed)}</footer><script>{_SCRIPT}</script>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def _origin(typed: str) -> str:
    """What a page was made by, and when; the day is that of SOURCE_DATE_EPOCH where builds have to repeat."""
    seconds = os.environ.get("SOURCE_DATE_EPOCH", "")
    day = datetime.fromtimestamp(int(seconds) if seconds.isdecimal() else time.time(), UTC).date()
    command = f"<code>{escape(typed)}</code><br>" if typed else ""
    return f"{command}prunectl {escape(__version__)}, {day}"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _failures(failures: Iterable[Failure]) -> str:
    return "".join(
        f'<p class="bad">{escape(failure.path)}: {escape(failure.error.message)}</p><p>{escape(failure.error.hint)}</p>'
        for failure in failures
    )


def _gates(report: Report, units: Units) -> str:
    # Of findings, which are gates that say more, there is a table.
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
    # What is drawn in letters for a terminal is a picture here.
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
    """The pictures of each model; those of several are side by side where there is room."""
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
    """Refuse a place that a page cannot have, before any work begins."""
    atomic.check_parent(path)
    if path.is_dir():
        raise UsageError(f"{path} is a folder", hint=f"name a file: --html {path / 'report.html'}")
    if path.is_file() and not _is_ours(path):
        raise UsageError(f"{path} exists and is not a prunectl report", hint="choose another file, or remove this one")


def write(path: Path, report: Report, command: str, units: Units, typed: str = "") -> int:
    """Write a report as a page, and return its bytes."""
    # Whatever the command itself has written there meanwhile stays.
    check(path)
    text = page(report, command, units, typed)
    atomic.write_text(path, text, is_forced=True)
    return len(text.encode())


def _is_ours(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    return not head or GENERATOR_TAG.encode() in head


_SCRIPT = """
"use strict";
const order = (one, other) => {
  const [a, b] = [one, other].map(cell => cell.dataset.v ?? cell.textContent);
  if (a === "" || b === "") return (a === "") - (b === "");
  return one.dataset.v !== undefined ? a - b : a.localeCompare(b, "en", { numeric: true });
};
const isEmpty = cell => (cell.dataset.v ?? cell.textContent) === "";
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, at) => head.querySelector("button")?.addEventListener("click", () => {
    const isUp = head.getAttribute("aria-sort") !== "ascending";
    for (const other of heads) if (other.ariaSort) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", isUp ? "ascending" : "descending");
    const rows = [...body.rows].sort((one, other) => {
      const [a, b] = [one.cells[at], other.cells[at]];
      return isEmpty(a) || isEmpty(b) || isUp ? order(a, b) : order(b, a);
    });
    body.append(...rows);
  }));
}
for (const field of document.querySelectorAll("input[type=search]")) {
  const body = document.getElementById(field.dataset.table).tBodies[0];
  const told = field.parentElement.querySelector("output");
  field.addEventListener("input", () => {
    const word = field.value.toLowerCase();
    let shown = 0;
    for (const row of body.rows) {
      row.hidden = !row.textContent.toLowerCase().includes(word);
      shown += !row.hidden;
    }
    told.textContent = word ? shown + " of " + body.rows.length + " rows" : "";
  });
}
"""
"""What the page does: sort a table by a column, and show the rows that hold a word."""
_STYLE = """
:root { color-scheme: light dark; --back: #fff; --ink: #1b1f24; --dim: #59636e; --line: #d1d9e0; --mark: #0b6bcb;
  --bar: #0b6bcb; --rest: #e4e9ee; --bad: #c4232b; --good: #1a7f37; --warn: #9a6700; --low: #b8c2cc }
@media (prefers-color-scheme: dark) { :root { --back: #12161b; --ink: #e6edf3; --dim: #9aa6b2; --line: #343c46;
  --mark: #6cb6ff; --bar: #6cb6ff; --rest: #2a313a; --bad: #ff7b72; --good: #56d364; --warn: #d29922; --low: #39424d } }
* { box-sizing: border-box }
body { margin: 0; padding: 1.5rem; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.4rem; overflow-wrap: anywhere } h2 { font-size: 1.15rem; margin-top: 2.2rem; overflow-wrap: anywhere }
h3 { font-size: 1rem; margin-bottom: .4rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem } dt { color: var(--dim) }
dd { margin: 0; overflow-wrap: anywhere }
.scroll { overflow-x: auto }
.models { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(34rem, 100%), 1fr)); gap: 0 2rem }
.models > * { min-width: 0 }
.bars { display: grid; grid-template-columns: fit-content(45%) 1fr max-content; gap: .15rem .6rem; font-size: .85rem }
.bars > :first-child, .bars > :nth-child(3n + 1) { overflow-wrap: anywhere; text-align: right }
.bars svg { min-width: 0; max-width: none; height: 1rem; align-self: center }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: max-content }
th, td { padding: .2rem .7rem; text-align: left; border-bottom: 1px solid var(--line); overflow-wrap: break-word;
  max-width: 34rem }
td.n, th.n { text-align: right; white-space: nowrap }
thead th { padding: 0; position: sticky; top: 0; background: var(--back) }
th button { font: inherit; font-weight: 600; color: var(--dim); background: none; border: 0; padding: .3rem .7rem;
  width: 100%; text-align: inherit; white-space: nowrap; cursor: pointer }
th[aria-sort=ascending] button::after { content: " \\2191" }
th[aria-sort=descending] button::after { content: " \\2193" }
tfoot td { font-weight: 600 }
:focus-visible { outline: 2px solid var(--mark); outline-offset: 1px }
input { font: inherit; padding: .25rem .5rem; border: 1px solid var(--line); border-radius: 4px;
  background: var(--back); color: inherit; margin-bottom: .5rem }
output { color: var(--dim); margin-left: .6rem }
pre { line-height: 1.15; overflow-x: auto }
.remarks { max-width: 60rem } .bad { color: var(--bad) }
.good { color: var(--good) } .warn { color: var(--warn) }
svg { display: block; width: 100%; min-width: 34rem; max-width: 80rem; height: auto }
svg text { fill: var(--ink); font: 11px system-ui, sans-serif }
svg .dim { fill: var(--dim) } svg .grid { stroke: var(--line) } svg .bar { fill: var(--bar) }
svg .rest { fill: var(--rest) }
svg .step { fill: none; stroke: var(--low); stroke-width: 2 } svg .dot { fill-opacity: .55 }
svg .best { stroke: var(--ink); stroke-width: 1.5 }
svg .dense { fill: var(--back); stroke: var(--ink); stroke-width: 2 }
svg .f0 { fill: #0072b2 } svg .f1 { fill: #d55e00 } svg .f2 { fill: #009e73 } svg .f3 { fill: #cc79a7 }
svg .f4 { fill: #56b4e9 } svg .f5 { fill: #e69f00 }
svg .curve { fill: none; stroke-width: 2 }
svg .c0 { stroke: #0072b2 } svg .c1 { stroke: #d55e00 } svg .c2 { stroke: #009e73 } svg .c3 { stroke: #cc79a7 }
svg .c4 { stroke: #56b4e9 } svg .c5 { stroke: #e69f00 }
svg .cell { fill: var(--bar); stroke: var(--back) }
.masks { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-end }
figure { margin: 0; max-width: 18rem } figcaption { font-size: .8rem; color: var(--dim); overflow-wrap: anywhere }
img { image-rendering: pixelated; border: 1px solid var(--line); max-width: 100% }
.tall { max-height: 32rem; overflow-y: auto }
footer { margin-top: 3rem; color: var(--dim); overflow-wrap: anywhere }
@media print { input, output { display: none } thead th { position: static } }
"""
