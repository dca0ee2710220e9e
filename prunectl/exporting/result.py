"""What an export comes to."""

from __future__ import annotations

from dataclasses import dataclass

from prunectl.exporting.parity import Parity
from prunectl.measuring.survey import Survey


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written, and how it compares with what it was made of."""

    before: Survey
    after: Survey
    source: str
    """The format, as people call it."""
    target: str
    parity: Parity | None
    """None for weights alone, which are the same to the bit."""
    remarks: tuple[str, ...]
    beside: tuple[tuple[str, int], ...] = ()
    """Other files that were written: their paths, and their bytes."""
