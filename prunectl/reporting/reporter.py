"""What commands speak through: data to stdout, everything else to stderr."""

from __future__ import annotations

import resource
import shutil
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from prunectl import units as words
from prunectl.errors import PrunectlError
from prunectl.measuring.gates import gate_sentence
from prunectl.reporting import envelope, human, rows
from prunectl.reporting.progress import Progress
from prunectl.reporting.report import Artifact, Report
from prunectl.reporting.settings import Layout, Settings
from prunectl.reporting.streams import console, never_fail
from prunectl.units import printable

_BEGAN = time.time()


@dataclass(frozen=True, slots=True)
class Reporter:
    """Speaks in the way that the user chose."""

    settings: Settings
    command: str
    html: Path | None = None
    """Where what is shown is also written, as a page."""

    @property
    def is_json(self) -> bool:
        """Whether a script is listening."""
        return self.settings.chosen_layout is Layout.JSON

    def progress(self, label: str, total_bytes: int) -> AbstractContextManager[Progress]:
        """Return a bar that appears when work takes longer than a second."""
        return Progress(label, total_bytes, self.settings)

    def note(self, text: str) -> None:
        """Say on stderr how far work has come."""
        if not self.settings.is_quiet:
            never_fail(sys.stderr)
            sys.stderr.write(f"{printable(text)}\n")
            sys.stderr.flush()

    def show(self, report: Report) -> int:
        """Print what a command found, and return its exit code."""
        never_fail(sys.stdout)
        layout = self.settings.chosen_layout
        # Of nothing but failures there is nothing to see on a page.
        if self.html is not None and (report.models or report.sections or not report.failures):
            report = self._paged(report, self.html)
        if self.settings.is_quiet and layout is not Layout.JSON:
            report = _without_remarks(report)
        if layout is Layout.JSON:
            sys.stdout.write(envelope.of_report(report, self.command))
            return report.exit_code
        if self.settings.is_quiet and report.bare is not None:
            sys.stdout.writelines(f"{line}\n" for line in report.bare)
        elif layout is Layout.HUMAN:
            human.show(report, console(sys.stdout, self.settings), self.settings)
        else:
            sys.stdout.write(_as_rows(report, layout, self.settings))
            self._note_aside(report)
        sys.stdout.flush()
        for failure in report.failures:
            complain(failure.error)
        if self.settings.is_verbose:
            sys.stderr.write(
                f"took {_seconds():.2f} s and {words.nbytes(_peak_bytes(), self.settings.units)} of memory\n"
            )
        return report.exit_code

    def pour(self, path: Path) -> int:
        """Send a file to standard output, which carries nothing else then."""
        with path.open("rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer)
        sys.stdout.buffer.flush()
        return 0

    def _paged(self, report: Report, path: Path) -> Report:
        """Write a report as a page, and return it with the page among what was written."""
        from prunectl.reporting.html.file import write  # noqa: PLC0415 - most reports are for terminals and scripts

        nbytes = write(path, report, self.command, self.settings.units)
        return replace(report, artifacts=(*report.artifacts, Artifact(str(path), nbytes)))

    def _note_aside(self, report: Report) -> None:
        """Say on stderr what the rows on stdout have no place for."""
        never_fail(sys.stderr)
        lines = [
            f"{'pass' if gate.ok else 'FAIL'}: {gate_sentence(gate, self.settings.units)}" for gate in report.gates
        ]
        lines += [f"note: {remark}" for remark in report.remarks]
        lines += [f"note: {section.title}: {text}" for section in report.sections for text in section.remarks]
        sys.stderr.writelines(printable(line) + "\n" for line in lines)


def _without_remarks(report: Report) -> Report:
    return replace(report, remarks=(), sections=tuple(replace(section, remarks=()) for section in report.sections))


def _seconds() -> float:
    """Return the time since this module was loaded, a few hundredths after the process began."""
    return time.time() - _BEGAN


def _peak_bytes() -> int:
    # Linux counts kilobytes here, macOS bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def complain(error: PrunectlError) -> None:
    """Print an error and what to do about it on stderr."""
    never_fail(sys.stderr)
    lines = [f"error: {printable(error.message)}"]
    if error.did_you_mean:
        lines.append(f"  did you mean: {printable(', '.join(error.did_you_mean))} ?")
    lines += [f"  {printable(line)}" for line in error.hint.splitlines()]
    sys.stderr.writelines(line + "\n" for line in lines)


def _as_rows(report: Report, layout: Layout, settings: Settings) -> str:
    if layout is Layout.CSV:
        return rows.comma_separated(report.main)
    if layout is Layout.MARKDOWN:
        return rows.markdown(report.main, settings.units)
    drawings = (line for section in report.sections if section.lines for line in (section.title, *section.lines))
    return rows.plain(report.main) + "".join(f"{line}\n" for line in drawings)
