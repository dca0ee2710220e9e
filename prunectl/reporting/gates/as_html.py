"""Findings as a page for a browser, the same as `check --html` writes."""

from __future__ import annotations

import importlib

from prunectl.gating.finding import Findings
from prunectl.reporting.check_report import check_report
from prunectl.units import Units


def as_html(found: Findings) -> str:
    """Return the page."""
    # Most reports are for scripts, and do without what draws pages.
    text: str = importlib.import_module("prunectl.reporting.html.page").page(
        check_report(found, has_gates=False), "check", Units.SI
    )
    return text
