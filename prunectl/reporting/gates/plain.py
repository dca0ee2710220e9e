"""Findings for `cut` and `awk`."""

from __future__ import annotations

from prunectl.gating.finding import Findings
from prunectl.reporting import rows
from prunectl.reporting.check_report import rows as rows_of


def plain(found: Findings) -> str:
    """Return tab-separated rows with raw numbers: verdict, gate, model, tensor, actual, limit, unit, budget."""
    return rows.plain(rows_of(found.findings))
