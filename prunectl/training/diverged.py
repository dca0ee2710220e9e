"""Training that ended in numbers that are none."""

from __future__ import annotations

from prunectl.errors import WorkError


class DivergedError(WorkError):
    """Training went astray: its loss or its weights are finite numbers no more."""
