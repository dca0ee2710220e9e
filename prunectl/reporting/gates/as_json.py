"""Findings as the one object that `--json` prints."""

from __future__ import annotations

from prunectl.gating.finding import Findings
from prunectl.reporting import envelope
from prunectl.reporting.check_report import check_report

COMMAND = "check"


def as_json(found: Findings) -> str:
    """Return the envelope."""
    return envelope.of_report(check_report(found, has_gates=True), COMMAND)
