"""Tables that can be sorted and filtered, also by keyboard."""

from __future__ import annotations

from prunectl.reporting.html.text import safe, tag
from prunectl.reporting.table import Cell, Column, Table
from prunectl.units import Units

_FILTERED_FROM = 9
"""Rows that are seen at a glance need no filter."""


def table_html(table: Table, identity: str, units: Units) -> str:
    """Return a table; its rows are those of the report, in that order until somebody clicks."""
    heads = "".join(_head(column) for column in table.columns)
    rows = "".join(_row(table, row, units) for row in table.rows)
    foot = f"<tfoot>{_row(table, table.total, units)}</tfoot>" if table.total else ""
    inside = f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody>{foot}"
    name = safe(table.title or table.name)
    whole = f'<table class="sortable" id="{identity}" aria-label="{name}">{inside}</table>'
    around = f'<div class="scroll" tabindex="0" role="group" aria-label="{name}">{whole}</div>'
    return f"{_filter(table, identity, name)}{around}"


def _filter(table: Table, identity: str, name: str) -> str:
    if len(table.rows) < _FILTERED_FROM:
        return ""
    field = f'<input type="search" placeholder="filter" aria-label="filter {name}" data-table="{identity}">'
    return f'<div>{field}<output aria-live="polite"></output></div>'


def _head(column: Column) -> str:
    if not column.name:
        return "<td></td>"
    button = tag("button", safe(column.name), type="button")
    return f'<th scope="col" aria-sort="none"{_kind(column)}>{button}</th>'


def _row(table: Table, row: tuple[Cell, ...], units: Units) -> str:
    return f"<tr>{''.join(_cell(column, cell, units) for column, cell in zip(table.columns, row, strict=True))}</tr>"


def _cell(column: Column, cell: Cell, units: Units) -> str:
    spelled = safe(column.spell(cell, units))
    if not column.is_number:
        return f"<td>{spelled}</td>"
    value = "" if cell is None or isinstance(cell, str) else f"{cell:.6g}" if isinstance(cell, float) else str(cell)
    return f'<td class="n" data-v="{value}">{spelled}</td>'


def _kind(column: Column) -> str:
    return ' class="n"' if column.is_number else ""
