"""The table at the end of a command that writes: what it was, what it is."""

from __future__ import annotations

from prunectl.measuring.survey import Survey
from prunectl.reporting.table import Cell, Column, Table, Unit

_COLUMNS = (
    Column(""),
    Column("sparsity", Unit.RATIO),
    Column("raw", Unit.BYTES),
    Column("packed", Unit.BYTES),
    Column("gzip", Unit.BYTES),
)


def before_after(before: Survey, after: Survey) -> Table:
    """Return the sizes of a model before and after, and how many of its prunable weights are zero."""
    return Table("sizes", _COLUMNS, (_row("before", before), _row("after", after)))


def _row(name: str, found: Survey) -> tuple[Cell, ...]:
    return (name, found.prunable_sparsity, found.bytes.raw, found.bytes.packed, found.bytes.compressed)
