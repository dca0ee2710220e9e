"""What commands speak through: data to stdout, everything else to stderr."""

from __future__ import annotations

import resource
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from typer import Abort, TyperException

from prunectl.analysis.sizes import gate_sentence
from prunectl.errors import PrunectlError, UsageError, translate
from prunectl.reporting import terminal
from prunectl.reporting.report import (
    Artifact,
    Layout,
    Report,
    Settings,
    comma_separated,
    failure_json,
    markdown,
    report_json,
    tab_separated,
)
from prunectl.reporting.terminal import ProgressBars, escape_unencodable, make_console
from prunectl.units import nbytes, printable

_BEGAN = time.time()


@dataclass(frozen=True, slots=True)
class Reporter:
    """Speaks in the way that the user chose."""

    settings: Settings
    command: str
    html: Path | None = None
    """Where what is shown is also written, as a page."""
    on_success: Callable[[], tuple[str, ...]] = tuple
    """Called when a command has succeeded, right before its report is shown; returns notes to add to it."""

    @property
    def is_json(self) -> bool:
        """Whether a script is listening."""
        return self.settings.effective_layout is Layout.JSON

    def progress(self, label: str, total_bytes: int) -> AbstractContextManager[ProgressBars]:
        """A bar that appears when work takes longer than a second."""
        return ProgressBars(label, total_bytes, self.settings)

    def note(self, text: str) -> None:
        """Say on stderr how far work has come."""
        if not self.settings.is_quiet:
            escape_unencodable(sys.stderr)
            sys.stderr.write(f"{printable(text)}\n")
            sys.stderr.flush()

    def show(self, report: Report) -> int:
        """Print what a command found, and return its exit code."""
        escape_unencodable(sys.stdout)
        layout = self.settings.effective_layout
        # Of nothing but failures there is nothing to see on a page.
        if self.html is not None and (report.models or report.sections or not report.failures):
            report = self._with_html_page(report, self.html)
        if report.exit_code == 0:
            report = replace(report, notes=(*report.notes, *self.on_success()))
        if self.settings.is_quiet and layout is not Layout.JSON:
            report = _without_notes(report)
        if layout is Layout.JSON:
            sys.stdout.write(report_json(report, self.command))
            return report.exit_code
        if self.settings.is_quiet and report.quiet_lines is not None:
            sys.stdout.writelines(f"{line}\n" for line in report.quiet_lines)
        elif layout is Layout.HUMAN:
            terminal.render(report, make_console(sys.stdout, self.settings), self.settings)
        else:
            sys.stdout.write(_as_rows(report, layout, self.settings))
            self._note_on_stderr(report)
        sys.stdout.flush()
        for failure in report.failures:
            print_error(failure.error)
        if self.settings.is_verbose:
            sys.stderr.write(f"took {_seconds():.2f} s and {nbytes(_peak_bytes(), self.settings.units)} of memory\n")
        return report.exit_code

    def copy_to_stdout(self, path: Path) -> int:
        """Send a file to standard output, which carries nothing else then."""
        with path.open("rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer)
        sys.stdout.buffer.flush()
        return 0

    def _with_html_page(self, report: Report, path: Path) -> Report:
        """Write a report as a page, and return it with the page among what was written."""
        from prunectl.reporting.html.page import write  # noqa: PLC0415 - most reports are for terminals and scripts

        nbytes = write(path, report, self.command, self.settings.units)
        return replace(report, artifacts=(*report.artifacts, Artifact(str(path), nbytes)))

    def _note_on_stderr(self, report: Report) -> None:
        """Say on stderr what the rows on stdout have no place for."""
        escape_unencodable(sys.stderr)
        lines = [
            f"{'pass' if gate.ok else 'FAIL'}: {gate_sentence(gate, self.settings.units)}" for gate in report.gates
        ]
        lines += [f"note: {note}" for note in report.notes]
        lines += [f"note: {section.title}: {text}" for section in report.sections for text in section.notes]
        sys.stderr.writelines(printable(line) + "\n" for line in lines)


def _without_notes(report: Report) -> Report:
    return replace(report, notes=(), sections=tuple(replace(section, notes=()) for section in report.sections))


def _seconds() -> float:
    """Seconds since this module was loaded, a few hundredths after the process began."""
    return time.time() - _BEGAN


def _peak_bytes() -> int:
    # Linux counts kilobytes here, macOS bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def print_error(error: PrunectlError) -> None:
    """Print an error and what to do about it on stderr."""
    escape_unencodable(sys.stderr)
    lines = [f"error: {printable(error.message)}"]
    if error.did_you_mean:
        lines.append(f"  did you mean: {printable(', '.join(error.did_you_mean))} ?")
    lines += [f"  {printable(line)}" for line in error.hint.splitlines()]
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
    """Prunectl itself is at fault."""

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
        print_error(reported)
    return reported.exit_code


def wants_json(arguments: list[str]) -> bool:
    """Whether the command line asks for JSON, even if the rest of it cannot be understood."""
    return not {"--json", "--format=json"}.isdisjoint(arguments) or ("--format", "json") in pairwise(arguments)


def _to_prunectl_error(error: Exception) -> PrunectlError:
    if isinstance(error, PrunectlError):
        return error
    if isinstance(error, TyperException):
        return UsageError(_sentence(error.format_message()), hint=_help_hint(error))
    known = translate(error)
    if known is not None:
        return known
    return _BugError(
        f"this is a bug in prunectl: {type(error).__name__}: {error}",
        hint="please report it, with the traceback that --debug shows",
    )


def _sentence(message: str) -> str:
    return " ".join(message.split()).rstrip(".")


def _help_hint(error: TyperException) -> str:
    """A hint at the help of the command that was typed, or of prunectl after a slip in its name."""
    context = getattr(error, "ctx", None)
    return f"see: {context.command_path if context is not None else 'prunectl'} --help"
