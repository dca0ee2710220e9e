"""How training went: a line for each number of its epochs, losses apart from the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prunectl.reporting.html import axes
from prunectl.reporting.html.text import safe
from prunectl.reporting.report import Report
from prunectl.reporting.table import Table, Unit

_TABLE = "epochs"
_COLOURS, _LEGEND_LINE, _MARKS = 6, 18, 8


def curves(report: Report) -> str:
    """Return the pictures of what a report says epoch by epoch; nothing of less than two."""
    tables = [table for section in report.sections for table in section.tables if table.name == _TABLE]
    return "".join(_pictures(table) for table in tables if len(table.rows) > 1)


def _pictures(table: Table) -> str:
    columns = {column.name: at for at, column in enumerate(table.columns) if column.unit in {Unit.NUMBER, Unit.RATIO}}
    lines = {name: _values(table, at) for name, at in columns.items()}
    losses = {name: values for name, values in lines.items() if "loss" in name and values}
    others = {name: values for name, values in lines.items() if "loss" not in name and values}
    return "".join(_picture(group) for group in (losses, others) if group)


def _values(table: Table, at: int) -> list[tuple[int, float]]:
    cells = [row[at] for row in table.rows]
    return [(epoch, float(cell)) for epoch, cell in enumerate(cells, 1) if isinstance(cell, int | float)]


def _picture(lines: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    x = axes.across([epoch for values in lines.values() for epoch, _ in values])
    y = axes.upwards([value for values in lines.values() for _, value in values])
    last = max(epoch for values in lines.values() for epoch, _ in values)
    marks = {float(epoch): str(epoch) for epoch in range(1, last + 1, max(round(last / _MARKS), 1))}
    inside = axes.frame(x, y, ("epoch", ""), marks)
    top = axes.TOP + axes.HEIGHT + axes.BELOW
    for at, (name, values) in enumerate(lines.items()):
        kind = f"curve c{at % _COLOURS}"
        points = " ".join(f"{x.at(epoch):.1f},{y.at(value):.1f}" for epoch, value in values)
        inside += f'<polyline class="{kind}" points="{points}"><title>{safe(name)}</title></polyline>'
        inside += f'<path class="{kind}" d="M{axes.LEFT} {top + at * _LEGEND_LINE + 8}h24"/>'
        inside += f'<text x="{axes.LEFT + 32}" y="{top + at * _LEGEND_LINE + 12}">{safe(name)}</text>'
    return axes.plot(f"{', '.join(lines)} by epoch", inside, more=_LEGEND_LINE * len(lines))
