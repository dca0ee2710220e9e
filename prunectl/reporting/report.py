"""The report of a command as a value, from which every layout is drawn."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

from prunectl.analysis.sizes import LimitCheck
from prunectl.analysis.sparsity_map import SparsityMap
from prunectl.errors import PrunectlError, abbreviated
from prunectl.units import Units, count, nbytes, percent, printable

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

    def format(self, cell: Cell, units: Units) -> str:
        """A cell as people read it."""
        if cell is None:
            return "-"
        if self.unit is Unit.COUNT and isinstance(cell, int):
            return count(cell)
        if self.unit is Unit.BYTES and isinstance(cell, int):
            return nbytes(cell, units)
        if self.unit is Unit.RATIO and isinstance(cell, int | float):
            return percent(cell)
        if self.unit is Unit.FACTOR and isinstance(cell, int | float):
            return f"{cell:.2f}x"
        if self.unit is Unit.NUMBER and isinstance(cell, int | float):
            return f"{cell:.4g}"
        return printable(abbreviated(str(cell), _MAX_SHOWN))


Row = tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """Columns, rows, and a last row of totals."""

    name: str
    columns: tuple[Column, ...]
    cells: tuple[Row, ...] | Callable[[], Iterable[Row]]
    """The rows, or what makes them once they are shown."""
    total: Row | None = None
    title: str = ""

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The rows without the last one."""
        return tuple(self.cells()) if callable(self.cells) else self.cells

    def raw_row(self, row: Sequence[Cell]) -> list[str]:
        """A row as programs read it: plain numbers, ratios from 0 to 1."""
        return ["" if cell is None else _plain(cell) for cell in row]


def _plain(cell: str | int | float) -> str:  # noqa: PYI041 - the three kinds of cell, spelled out
    if isinstance(cell, float):
        return f"{cell:.6g}"
    return printable(abbreviated(cell, _MAX_WRITTEN)) if isinstance(cell, str) else str(cell)


@dataclass(frozen=True, slots=True)
class Failure:
    """One input of several that could not be used."""

    path: str
    error: PrunectlError


@dataclass(frozen=True, slots=True)
class Artifact:
    """A file or folder that was written."""

    path: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Section:
    """The part of a report that is about one model: facts, then tables, then remarks."""

    title: str
    facts: tuple[tuple[str, str], ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    drawing: tuple[str, ...] = ()
    """A drawing, line by line."""


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of a command."""

    models: tuple[dict[str, Any], ...]
    """What `--json` says of each model."""
    table: Table
    """The rows that pipes, CSV and Markdown get."""
    sections: tuple[Section, ...] = ()
    """What people get; the main table alone when there is none."""
    gates: tuple[LimitCheck, ...] = ()
    failures: tuple[Failure, ...] = ()
    artifacts: tuple[Artifact, ...] = ()
    notes: tuple[str, ...] = ()
    quiet_lines: tuple[str, ...] | None = None
    """What `--quiet` prints instead of everything else."""
    extra_json: Mapping[str, Any] = field(default_factory=dict)
    """What `--json` says beside the models."""
    sparsity_maps: Mapping[str, tuple[SparsityMap, ...]] = field(default_factory=dict)
    """Where the zeros of each model are, by its path: what a page shows."""

    exit_code_override: int | None = None
    """The exit code where some gates only warn, which is no reason to fail."""

    @property
    def exit_code(self) -> int:
        """The worst of what happened."""
        if self.exit_code_override is not None:
            return self.exit_code_override
        codes = [failure.error.exit_code for failure in self.failures]
        return max([*codes, 0 if all(gate.ok for gate in self.gates) else 1])


DEFAULT_ROWS = 40
"""How many rows of a table are shown on a terminal unless the user says so."""


class Layout(StrEnum):
    """How a report is printed."""

    HUMAN = "human"
    PLAIN = "plain"
    JSON = "json"
    CSV = "csv"
    MARKDOWN = "markdown"


class Color(StrEnum):
    """When to colour."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class Settings:
    """Every choice about output, made once."""

    layout: Layout | None = None
    is_quiet: bool = False
    is_verbose: bool = False
    color: Color = Color.AUTO
    has_progress: bool = True
    rows: int = DEFAULT_ROWS
    units: Units = Units.SI

    @property
    def effective_layout(self) -> Layout:
        """The layout asked for; else tables for a terminal, rows for a pipe."""
        return self.layout or (Layout.HUMAN if sys.stdout.isatty() else Layout.PLAIN)

    def colors(self, *, is_terminal: bool) -> bool:
        """Whether a stream gets colours: the option first, then the habits of the environment."""
        if self.color is not Color.AUTO:
            return self.color is Color.ALWAYS
        if os.environ.get("NO_COLOR"):
            return False
        if os.environ.get("FORCE_COLOR"):
            return True
        return is_terminal and os.environ.get("TERM") != "dumb"
