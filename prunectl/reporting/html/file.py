"""Where a page goes: into the place of an earlier one, never of anything else."""

from __future__ import annotations

from pathlib import Path

from prunectl.errors import UsageError
from prunectl.formats import outputs
from prunectl.reporting.html.page import MARK, page
from prunectl.reporting.report import Report
from prunectl.units import Units

_HEAD_BYTES = 512


def check(path: Path) -> None:
    """Refuse a place that a page cannot have, before any work begins."""
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path.parent} is not a folder", hint=f"mkdir -p {path.parent}")
    if path.is_dir():
        raise UsageError(f"{path} is a folder", hint=f"--html {path / 'report.html'}")
    if path.is_file() and not _is_ours(path):
        raise UsageError(f"{path} exists, and is no report of prunectl", hint="name another file, or remove it")


def write(path: Path, report: Report, command: str, units: Units) -> int:
    """Write a report as a page, and return its bytes."""
    # Whatever the command itself has written there meanwhile stays.
    check(path)
    text = page(report, command, units)
    outputs.write_text(path, text, is_forced=True)
    return len(text.encode())


def _is_ours(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    return not head or MARK.encode() in head
