"""A table as a value: columns that know their units, rows of plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from prunectl import units as words
from prunectl.errors import abbreviated
from prunectl.units import Units

Cell = str | int | float | None
_MAX_SHOWN, _MAX_WRITTEN = 200, 1000
"""Characters of a cell for people, and for programs: a name from a file may be as long as the file."""


class Unit(StrEnum):
    """What the numbers of a column count."""

    TEXT = "text"
    COUNT = "count"
    BYTES = "bytes"
    RATIO = "ratio"
    FACTOR = "factor"
    NUMBER = "number"


@dataclass(frozen=True, slots=True)
class Column:
    """The head of a column."""

    name: str
    unit: Unit = Unit.TEXT
    is_optional: bool = False
    """The first to go when a terminal is too narrow."""

    @property
    def is_number(self) -> bool:
        """Whether it is set to the right."""
        return self.unit is not Unit.TEXT

    def spell(self, cell: Cell, units: Units) -> str:
        """Return a cell as people read it."""
        if cell is None:
            return "-"
        if self.unit is Unit.COUNT and isinstance(cell, int):
            return words.count(cell)
        if self.unit is Unit.BYTES and isinstance(cell, int):
            return words.nbytes(cell, units)
        if self.unit is Unit.RATIO and isinstance(cell, int | float):
            return words.percent(cell)
        if self.unit is Unit.FACTOR and isinstance(cell, int | float):
            return f"{cell:.2f}x"
        if self.unit is Unit.NUMBER and isinstance(cell, int | float):
            return f"{cell:.4g}"
        return words.printable(abbreviated(str(cell), _MAX_SHOWN))


@dataclass(frozen=True, slots=True)
class Table:
    """Columns, rows, and a last row of totals."""

    name: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    total: tuple[Cell, ...] | None = None
    title: str = ""

    def raw(self, row: Sequence[Cell]) -> list[str]:
        """Return a row as programs read it: plain numbers, ratios from 0 to 1."""
        return ["" if cell is None else _plain(cell) for cell in row]


def _plain(cell: str | int | float) -> str:  # noqa: PYI041 - the three kinds of cell, spelled out
    if isinstance(cell, float):
        return f"{cell:.6g}"
    return words.printable(abbreviated(cell, _MAX_WRITTEN)) if isinstance(cell, str) else str(cell)
