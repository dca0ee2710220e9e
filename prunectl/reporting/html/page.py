"""The page: what a report says to people, and pictures of what it says to scripts."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from itertools import count as numbers

from prunectl import __version__
from prunectl.measuring.gates import Gate, gate_sentence
from prunectl.measuring.shading import Shading
from prunectl.reporting.html.bars import bars
from prunectl.reporting.html.curves import curves
from prunectl.reporting.html.masks import masks
from prunectl.reporting.html.pareto import pareto
from prunectl.reporting.html.script import SCRIPT
from prunectl.reporting.html.style import STYLE
from prunectl.reporting.html.tables import table_html
from prunectl.reporting.html.text import safe, tag
from prunectl.reporting.html.treemap import treemap
from prunectl.reporting.report import Failure, Report, Section
from prunectl.units import Units

MARK = '<meta name="generator" content="prunectl">'
"""By which one of our pages is known again."""
PLOT = "plot"
"""The name of a table that draws the points of a sweep."""


def page(report: Report, command: str, units: Units) -> str:
    """Return a report as a whole file."""
    title = f"prunectl {command}"
    rules = (
        f"default-src 'none'; style-src {_hash(STYLE)}; script-src {_hash(SCRIPT)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    head = (
        f'<meta charset="utf-8">{MARK}<meta http-equiv="Content-Security-Policy" content="{rules}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{safe(title)}</title>'
        f"<style>{STYLE}</style>"
    )
    verdict = '<p class="good">ok</p>' if report.exit_code == 0 else f'<p class="bad">exit code {report.exit_code}</p>'
    body = (
        f"<main><h1>{safe(title)}</h1>{verdict}{_failures(report.failures)}{_gates(report, units)}"
        f"{_remarks(report.remarks)}{_plots(report, units)}{_sections(report, units)}{_models(report, units)}</main>"
        f"<footer>prunectl {safe(__version__)}</footer><script>{SCRIPT}</script>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _failures(failures: Iterable[Failure]) -> str:
    return "".join(
        f'<p class="bad">{safe(failure.path)}: {safe(failure.error.message)}</p>{tag("p", safe(failure.error.hint))}'
        for failure in failures
    )


def _gates(report: Report, units: Units) -> str:
    # Of findings, which are gates that say more, there is a table.
    gates = [gate for gate in report.gates if type(gate) is Gate]
    return "".join(
        f'<p class="{"good" if gate.ok else "bad"}">{"pass" if gate.ok else "FAIL"}: '
        f"{safe(gate_sentence(gate, units))}</p>"
        for gate in gates
    )


def _remarks(remarks: Sequence[str]) -> str:
    return f'<ul class="remarks">{"".join(tag("li", safe(text)) for text in remarks)}</ul>' if remarks else ""


def _plots(report: Report, units: Units) -> str:
    plot = pareto(report.models, units)
    return (f"<h2>Pareto front</h2>{plot}" if plot else "") + curves(report)


def _sections(report: Report, units: Units) -> str:
    has_plot = any("point" in model for model in report.models)
    sections = report.sections or (Section("", tables=(report.main,)),)
    number = numbers()
    return "".join(_section(section, units, number, has_plot=has_plot) for section in sections)


def _section(section: Section, units: Units, number: Iterable[int], *, has_plot: bool) -> str:
    # What is drawn in letters for a terminal is a picture here.
    shown = [table for table in section.tables if not (has_plot and table.name == PLOT)]
    facts = "".join(f"{tag('dt', safe(name))}{tag('dd', safe(value))}" for name, value in section.facts)
    drawing = tag("pre", "\n".join(map(safe, section.lines))) if section.lines else ""
    tables = "".join(
        f"{tag('h3', safe(table.title or table.name))}{table_html(table, f't{identity}', units)}"
        for table, identity in zip(shown, number, strict=False)
        if table.rows or table.total
    )
    inside = f"{tag('dl', facts) if facts else ''}{drawing}{tables}{_remarks(section.remarks)}"
    return f"{tag('h2', safe(section.title)) if section.title else ''}{inside}" if inside else ""


def _models(report: Report, units: Units) -> str:
    return "".join(
        _model(model, report.masks.get(str(model["path"]), ()), units) for model in report.models if model.get("layers")
    )


def _model(model: dict[str, object], found: Sequence[Shading], units: Units) -> str:
    layers = model["layers"]
    assert isinstance(layers, list)
    parts = (
        ("where the bytes lie", treemap(layers, units)),
        ("sparsity by tensor", bars(layers)),
        ("where the zeros are", masks(found)),
    )
    pictures = "".join(f"<h3>{title}</h3>{picture}" for title, picture in parts if picture)
    return f"<section>{tag('h2', safe(str(model['path'])))}{pictures}</section>" if pictures else ""
