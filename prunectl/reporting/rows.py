"""Tables for programs and for documents: tab-separated, CSV, Markdown."""

from __future__ import annotations

import csv
import io

from prunectl.reporting.table import Table
from prunectl.units import Units


def plain(table: Table) -> str:
    """Return tab-separated rows without a head, for `cut` and `awk`."""
    return "".join("\t".join(table.raw(row)) + "\n" for row in table.rows)


def comma_separated(table: Table) -> str:
    """Return CSV with a head."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([column.name for column in table.columns])
    writer.writerows(table.raw(row) for row in table.rows)
    return text.getvalue()


def markdown(table: Table, units: Units) -> str:
    """Return a Markdown table, its numbers as people read them."""
    lines = [
        [column.name for column in table.columns],
        ["---:" if column.is_number else "---" for column in table.columns],
    ]
    for row in (*table.rows, *([table.total] if table.total else [])):
        lines.append([column.spell(cell, units) for column, cell in zip(table.columns, row, strict=True)])
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
