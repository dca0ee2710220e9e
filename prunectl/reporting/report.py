"""The report of a command as a value, and as JSON, tab-separated rows, CSV and Markdown."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any

from prunectl import __version__
from prunectl.analysis.sizes import SENTENCES_ONLY, LimitCheck
from prunectl.analysis.stats import ModelStats, TensorStats
from prunectl.errors import PrunectlError, abbreviated
from prunectl.reporting.stdout import data_stream
from prunectl.units import Units, count, duration, nbytes, percent, printable

if TYPE_CHECKING:
    from prunectl.analysis.patterns import SparsityMap

Cell = str | int | float | None
_MAX_SHOWN, _MAX_WRITTEN = 200, 1000
"""The most characters of a cell for people, and for programs: a name from a file may be as long as the file."""


class Unit(StrEnum):
    """The unit of the numbers in a column."""

    TEXT = "text"
    COUNT = "count"
    BYTES = "bytes"
    RATIO = "ratio"
    FACTOR = "factor"
    NUMBER = "number"
    SECONDS = "seconds"


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table: its name and how its cells are shown."""

    name: str
    unit: Unit = Unit.TEXT
    is_optional: bool = False
    """Whether it is left out when a terminal is too narrow."""
    title: str = ""
    """The heading for people, if it differs from the name, which scripts depend on."""
    is_whole: bool = False
    """Whether its text is shown whole or not at all: a shape, a bar."""

    @property
    def heading(self) -> str:
        """The heading for people."""
        return self.title or self.name

    @property
    def is_number(self) -> bool:
        """Whether its cells are aligned to the right."""
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
        if self.unit is Unit.SECONDS and isinstance(cell, int | float):
            return duration(cell)
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
    """The rows, or a function that makes them when they are shown."""
    total: Row | None = None
    title: str = ""
    note: str = ""
    """A line that a terminal shows under it."""
    on_terminal: tuple[Table, ...] = ()
    """Tables that a terminal shows in its place."""

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The rows without the last one."""
        return tuple(self.cells()) if callable(self.cells) else self.cells

    def raw_row(self, row: Sequence[Cell]) -> list[str]:
        """A row for programs: plain numbers, ratios from 0 to 1."""
        return ["" if cell is None else _plain(cell) for cell in row]


def _plain(cell: str | int | float) -> str:  # noqa: PYI041 - the three kinds of cell, spelled out
    if isinstance(cell, str):
        # Most cells are short and plain, and a hundred thousand tensors have several each: the fast path comes first.
        is_plain = len(cell) <= _MAX_WRITTEN and cell.isprintable()
        return cell if is_plain else printable(abbreviated(cell, _MAX_WRITTEN))
    return f"{cell:.6g}" if isinstance(cell, float) else str(cell)


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
    """The part of a report about one model: facts, then tables, then notes."""

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
    """The JSON object of each model."""
    table: Table
    """The rows for pipes, CSV and Markdown."""
    sections: tuple[Section, ...] = ()
    """What people see; the main table alone if there are none."""
    gates: tuple[LimitCheck, ...] = ()
    failures: tuple[Failure, ...] = ()
    artifacts: tuple[Artifact, ...] = ()
    notes: tuple[str, ...] = ()
    summary: str = ""
    """The outcome in a sentence, for logs."""
    next_step: str = ""
    """The command that is likely to come next, for people at a terminal."""
    log_lines: tuple[str, ...] = ()
    """Sentences for logs, whose readers do not see the tables."""
    quiet_lines: tuple[str, ...] | None = None
    """What `--quiet` prints instead of everything else."""
    extra_json: Mapping[str, Any] = field(default_factory=dict)
    """Further members of the JSON document."""
    sparsity_maps: Mapping[str, tuple[SparsityMap, ...]] = field(default_factory=dict)
    """Maps of the zeros for the HTML page, by the path of the model."""

    exit_code_override: int | None = None
    """The exit code where it does not follow from failures and gates, as some gates only warn."""

    @property
    def exit_code(self) -> int:
        """The exit code: that of the worst failure, or 1 if a gate failed."""
        if self.exit_code_override is not None:
            return self.exit_code_override
        codes = [failure.error.exit_code for failure in self.failures]
        return max([*codes, 0 if all(gate.ok for gate in self.gates) else 1])


DEFAULT_ROWS = 40
"""The default number of rows of a table on a terminal."""


class Layout(StrEnum):
    """How a report is printed."""

    HUMAN = "human"
    PLAIN = "plain"
    JSON = "json"
    CSV = "csv"
    MARKDOWN = "markdown"


class Color(StrEnum):
    """Colour the output; auto: on a terminal."""

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
        """The layout that was chosen; by default tables for a terminal, rows for a pipe."""
        return self.layout or (Layout.HUMAN if data_stream().isatty() else Layout.PLAIN)

    def colors(self, *, is_terminal: bool) -> bool:
        """Whether a stream gets colours, by the option, else by NO_COLOR and the like."""
        if self.color is not Color.AUTO:
            return self.color is Color.ALWAYS
        if os.environ.get("NO_COLOR"):
            return False
        if os.environ.get("FORCE_COLOR"):
            return True
        return is_terminal and os.environ.get("TERM") != "dumb"


def tab_separated(table: Table) -> str:
    """Tab-separated rows without a heading, for `cut`, `awk` and `column -t`: an empty cell is a dash."""
    return "".join("\t".join(cell or "-" for cell in table.raw_row(row)) + "\n" for row in table.rows)


def comma_separated(table: Table) -> str:
    """CSV with a heading, in which no text is a formula."""
    import csv  # noqa: PLC0415 - most reports are for people

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
    """A Markdown table, with numbers formatted for people."""
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
        gates=[
            {item.name: getattr(gate, item.name) for item in fields(gate) if item.metadata != SENTENCES_ONLY}
            for gate in report.gates
        ],
        artifacts=[asdict(artifact) for artifact in report.artifacts],
        warnings=list(report.notes),
        error=error_json(worst.error) if worst else None,
        **report.extra_json,
    )


def failure_json(error: PrunectlError, command: str) -> str:
    """The JSON document of a command that failed as a whole."""
    return _document(command, error.exit_code, models=[], gates=[], artifacts=[], warnings=[], error=error_json(error))


def error_json(error: PrunectlError) -> dict[str, Any]:
    """The JSON object of an error."""
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
    return json.dumps(document, indent=2, sort_keys=True, allow_nan=False, default=list) + "\n"


_FACTS = tuple(field.name for field in fields(TensorStats))


@dataclass(frozen=True, slots=True)
class _Layers(Sequence[dict[str, Any]]):
    """The tensors of a model in a JSON document, made on access, as there may be a hundred thousand."""

    rows: tuple[TensorStats, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return _layer(self.rows[index])


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
        "layers": _Layers(stats.layers),
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
        **({} if stats.architecture is None else {"architecture": asdict(stats.architecture)}),
        **({} if stats.estimate is None else {"estimate": asdict(stats.estimate)}),
    }


def _layer(row: TensorStats) -> dict[str, Any]:
    # Not by `asdict`, which deep-copies each value: a model may have a hundred thousand tensors.
    facts = {name: getattr(row, name) for name in _FACTS}
    return {**facts, "shape": list(row.shape), "sparsity": row.sparsity, "tied_to": row.tied_to or None}
