"""What commands speak through: data to stdout, as tables on a terminal or as rows, everything else to stderr."""

from __future__ import annotations

import os
import resource
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from textwrap import wrap
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from typer import Abort, TyperException

from prunectl.analysis.sizes import gate_sentence
from prunectl.analysis.tensor_io import Items
from prunectl.errors import PrunectlError, translate
from prunectl.reporting.report import (
    DEFAULT_ROWS,
    Artifact,
    Color,
    Layout,
    Report,
    Section,
    Settings,
    comma_separated,
    failure_json,
    markdown,
    report_json,
    tab_separated,
)
from prunectl.reporting.stdout import data_stream
from prunectl.reporting.tables import print_table
from prunectl.units import nbytes, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


_BEGAN = time.time()


@dataclass(frozen=True, slots=True)
class Reporter:
    """Prints reports, notes and progress in the layout that the user chose."""

    settings: Settings
    command: str
    html: Path | None = None
    """The HTML page to which the report is written as well."""
    on_success: Callable[[], tuple[str, ...]] = tuple
    """Called when a command has succeeded, right before its report is shown; returns notes to add to it."""
    command_line: str = ""
    """The command line, for a page."""

    @property
    def is_json(self) -> bool:
        """Whether the output is JSON."""
        return self.settings.effective_layout is Layout.JSON

    def progress(self, label: str, total_bytes: int) -> AbstractContextManager[ProgressBars]:
        """A progress bar, which appears when work takes longer than a second."""
        return ProgressBars(label, total_bytes, self.settings)

    def note(self, text: str) -> None:
        """Print a note about progress on stderr."""
        if not self.settings.is_quiet:
            escape_unencodable(sys.stderr)
            sys.stderr.write(f"{printable(text)}\n")
            sys.stderr.flush()

    def show(self, report: Report) -> int:
        """Print the report of a command, and return its exit code."""
        escape_unencodable(data_stream())
        layout = self.settings.effective_layout
        # A page with nothing but failures would be empty.
        if self.html is not None and (report.models or report.sections or not report.failures):
            report = self._with_html_page(report, self.html)
        if report.exit_code == 0:
            report = replace(report, notes=(*report.notes, *self.on_success()))
        if self.settings.is_quiet and layout is not Layout.JSON:
            report = _without_notes(report)
        if layout is Layout.JSON:
            data_stream().write(report_json(report, self.command))
            return report.exit_code
        if self.settings.is_quiet and report.quiet_lines is not None:
            data_stream().writelines(f"{line}\n" for line in report.quiet_lines)
        elif layout is Layout.HUMAN:
            render(report, make_console(data_stream(), self.settings), self.settings)
        else:
            data_stream().write(_as_rows(report, layout, self.settings))
            self._note_on_stderr(report)
        data_stream().flush()
        for failure in report.failures:
            print_error(failure.error, self.settings.color)
        if self.settings.is_verbose:
            sys.stderr.write(f"took {_seconds():.2f} s, peak memory {nbytes(_peak_bytes(), self.settings.units)}\n")
        return report.exit_code

    def copy_to_stdout(self, path: Path) -> int:
        """Copy a file to standard output, to which nothing else is printed then."""
        with path.open("rb") as file:
            shutil.copyfileobj(file, data_stream().buffer)
        data_stream().buffer.flush()
        return 0

    def _with_html_page(self, report: Report, path: Path) -> Report:
        from prunectl.reporting.html import write  # noqa: PLC0415 - most reports are for terminals and scripts

        nbytes = write(path, report, self.command, self.settings.units, self.command_line)
        return replace(report, artifacts=(*report.artifacts, Artifact(str(path), nbytes)))

    def _note_on_stderr(self, report: Report) -> None:
        """Print on stderr the notes that have no place among the rows on stdout."""
        escape_unencodable(sys.stderr)
        lines = [
            f"{'pass' if gate.ok else 'FAIL'}: {gate_sentence(gate, self.settings.units)}" for gate in report.gates
        ]
        if report.summary and not self.settings.is_quiet:
            lines.append(report.summary)
        lines += report.log_lines
        lines += [f"note: {note}" for note in report.notes]
        is_one = len(report.sections) == 1
        lines += [
            f"note: {text}" if is_one else f"note: {section.title}: {text}"
            for section in report.sections
            for text in section.notes
        ]
        sys.stderr.writelines(printable(line) + "\n" for line in lines)


_NARROWEST = 20


def _without_notes(report: Report) -> Report:
    return replace(report, notes=(), sections=tuple(replace(section, notes=()) for section in report.sections))


def _seconds() -> float:
    """Seconds since this module was loaded, a few hundredths after the process began."""
    return time.time() - _BEGAN


def _peak_bytes() -> int:
    # ru_maxrss is in kilobytes on Linux, in bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def print_error(error: PrunectlError, color: Color = Color.AUTO) -> None:
    """Print an error and its hint on stderr; on a terminal in colour, and wrapped between words."""
    escape_unencodable(sys.stderr)
    is_terminal = sys.stderr.isatty()
    lines = [f"error: {printable(error.message)}"]
    if error.did_you_mean:
        lines.append(f"  did you mean: {printable(', '.join(error.did_you_mean))}?")
    lines += [f"  {printable(line)}" for line in error.hint.splitlines()]
    if is_terminal:
        width = max(shutil.get_terminal_size().columns, _NARROWEST)
        options = {"subsequent_indent": "  ", "break_long_words": False, "break_on_hyphens": False}
        lines[0] = lines[0].replace(" ", "\xa0", 1)  # so that a long path does not leave "error:" alone on its line
        lines = [part for line in lines for part in wrap(line, width, **options)]  # type: ignore[arg-type]
        lines[0] = lines[0].replace("\xa0", " ", 1)
    if Settings(color=color).colors(is_terminal=is_terminal):
        lines[0] = lines[0].replace("error:", "\x1b[1;31merror:\x1b[0m", 1)
    sys.stderr.writelines(line + "\n" for line in lines)


def _as_rows(report: Report, layout: Layout, settings: Settings) -> str:
    if layout is Layout.CSV:
        return comma_separated(report.table)
    if layout is Layout.MARKDOWN:
        return markdown(report.table, settings.units)
    drawings = (line for section in report.sections if section.drawing for line in (section.title, *section.drawing))
    return tab_separated(report.table) + "".join(f"{line}\n" for line in drawings)


CANCELLED, BUG = 130, 70


class _BugError(PrunectlError):
    """A bug of prunectl itself."""

    exit_code = BUG
    kind = "bug"


def report_error(error: Exception, arguments: list[str]) -> int:
    """Tell the user, or the script, what went wrong, and return the exit code."""
    if isinstance(error, Abort):
        return CANCELLED
    reported = _to_prunectl_error(error)
    if "--debug" in arguments:
        traceback.print_exception(error)
    if wants_json(arguments):
        command = next((argument for argument in arguments if not argument.startswith("-")), "")
        sys.stdout.write(failure_json(reported, command))
        sys.stdout.flush()
    else:
        print_error(reported, _color_asked_for(arguments))
    return reported.exit_code


def wants_json(arguments: list[str]) -> bool:
    """Whether a command line has --json, even if the rest of it cannot be parsed."""
    return not {"--json", "--format=json"}.isdisjoint(arguments) or ("--format", "json") in pairwise(arguments)


def _color_asked_for(arguments: list[str]) -> Color:
    """The value of --color on a command line, even if the rest of it cannot be parsed."""
    words = [word.partition("=")[2] for word in arguments if word.startswith("--color=")]
    words += [word for option, word in pairwise(arguments) if option == "--color"]
    return Color(words[-1]) if words and words[-1] in set(Color) else Color.AUTO


def _to_prunectl_error(error: Exception) -> PrunectlError:
    if isinstance(error, PrunectlError):
        return error
    if isinstance(error, TyperException):
        from prunectl.reporting.slips import usage_error  # noqa: PLC0415 - most command lines are right

        return usage_error(error)
    known = translate(error)
    if known is not None:
        return known
    return _BugError(
        f"this is a bug in prunectl: {type(error).__name__}: {error}",
        hint="please report it with the traceback: run the same command with --debug",
    )


def render(report: Report, console: Console, settings: Settings) -> None:
    """Print a report."""
    for number, section in enumerate(report.sections):
        if number:
            console.print()
        _print_section(section, report.table.name, console, settings)
    if not report.sections and report.table.rows:
        print_table(report.table, console, settings, settings.rows)
    for note in report.notes:
        _print_note(note, console)
    if report.next_step and not settings.is_quiet:
        console.print(f"Next: {printable(report.next_step)}", style="bold", soft_wrap=True)
    for gate in report.gates:
        sign, style = ("pass", "green") if gate.ok else ("FAIL", "bold red")
        console.print(f"{sign}  ", style=style, end="")
        console.print(gate_sentence(gate, settings.units), soft_wrap=True)


def _print_section(section: Section, main: str, console: Console, settings: Settings) -> None:
    if section.title:
        console.print(printable(section.title), style="bold", soft_wrap=True)
    width = max((len(name) for name, _ in section.facts), default=0)
    for name, value in section.facts:
        console.print(f"  {name:<{width}}  ", style="dim", end="")
        console.print(printable(value), soft_wrap=True)
    for line in section.drawing:
        console.print(line, soft_wrap=True)
    tables = [shown for table in section.tables for shown in table.on_terminal or (table,)]
    for number, table in enumerate(tables):
        if section.title or number:
            console.print()
        # -n shortens the list of tensors, not the few rows that sum it up.
        least = 0 if table.name == main else DEFAULT_ROWS
        print_table(table, console, settings, settings.rows and max(settings.rows, least))
    if section.notes:
        console.print()
    for note in section.notes:
        _print_note(note, console)


def _print_note(text: str, console: Console) -> None:
    # Not at hyphens, which names of options and files contain.
    lines = wrap(printable(text), max(console.width - 2, 20), break_on_hyphens=False)
    for number, line in enumerate(lines):
        console.print("  " if number else "* ", style="yellow", end="")
        console.print(line, soft_wrap=True)


_WIDE = 10_000
"""The width for other streams than terminals, so that nothing is cropped."""
_HEIGHT = 25
"""With TERM=dumb, rich uses an explicit width only together with an explicit height."""


def make_console(stream: TextIO, settings: Settings) -> Console:
    """A console for a stream."""
    from rich.console import Console  # noqa: PLC0415 - 40 ms that plain rows and JSON do not need

    escape_unencodable(stream)
    is_terminal = stream.isatty()
    width = os.environ.get("COLUMNS", "")
    if not width.isdecimal() or not int(width):
        width = str(_terminal_width(stream) if is_terminal else _WIDE)
    has_colors = settings.colors(is_terminal=is_terminal)
    return Console(
        file=stream,
        width=int(width),
        height=_HEIGHT,
        force_terminal=has_colors or is_terminal,
        no_color=not has_colors,
        color_system="auto" if has_colors and is_terminal else "standard" if has_colors else None,
        markup=False,
        highlight=False,
        emoji=False,
        legacy_windows=False,
    )


def escape_unencodable(stream: TextIO) -> None:
    """Let a stream escape characters that its encoding lacks."""
    if stream in {data_stream(), sys.stderr} and hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")


def _terminal_width(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except OSError:
        return 80


def is_watched(settings: Settings) -> bool:
    """Whether progress is shown: on a terminal, unless --quiet or --json is given."""
    return settings.has_progress and not settings.is_quiet and sys.stderr.isatty() and not os.environ.get("CI")


PATIENCE_SECONDS = 1.0


class ProgressBars:
    """Counts bytes or items, and shows a progress bar once the work has taken a while."""

    def __init__(self, label: str, total_bytes: int, settings: Settings) -> None:
        self._label, self._total, self._settings = label, total_bytes, settings
        self._done, self._began = 0, time.monotonic()
        self._lock = threading.Lock()
        self._is_wanted = is_watched(settings)
        self._bar: Progress | None = None

    def advance(self, nbytes: int) -> None:
        """Count finished work."""
        if not self._is_wanted:
            return
        # Several threads may call this at once.
        with self._lock:
            self._done += nbytes
            if self._bar is None and time.monotonic() - self._began > PATIENCE_SECONDS:
                self._bar = self._start()
            if self._bar is not None:
                self._bar.update(self._bar.task_ids[0], completed=self._done)

    def _start(self) -> Progress:
        from rich import progress  # noqa: PLC0415 - rich is loaded only for people

        bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn() if isinstance(self._total, Items) else progress.DownloadColumn(),
            progress.TimeRemainingColumn(),
            console=make_console(sys.stderr, self._settings),
            transient=True,
        )
        bar.add_task(self._label, total=self._total or None)
        bar.start()
        return bar

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
