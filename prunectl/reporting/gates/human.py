"""Findings for people, without colours."""

from __future__ import annotations

from prunectl.gating.finding import Findings
from prunectl.reporting.gates.words import sentence, summary
from prunectl.units import printable


def human(found: Findings) -> str:
    """Return a line for each finding, what could not be judged, and all of it in one line."""
    lines = [f"{one.verdict:<5}  {sentence(one)}" for one in found.findings]
    lines += [f"error  {one.error.message}" for one in found.unusable]
    lines += [f"note   {note}" for note in found.notes]
    return "".join(printable(line) + "\n" for line in (*lines, f"{found.file}: {summary(found)}"))
