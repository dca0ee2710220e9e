"""Does everything follow the pattern?"""

from __future__ import annotations

from collections.abc import Iterable

from prunectl.gating.budget import Wanted
from prunectl.gating.finding import Finding
from prunectl.gating.limits import all_or_none
from prunectl.gating.measured import Measured
from prunectl.measuring.survey import LayerRow

METRIC = "conforming"


def follows(found: Measured, wanted: Wanted, budget: str, message: str) -> Finding:
    """Return the verdict on all prunable tensors of a model whose inputs divide into groups."""
    share, worst = _worst(row for row in found.patterned(wanted.value).values() if row.is_prunable)
    return _finding(found, wanted, share, worst, budget=budget, message=message)


def tensor_follows(found: Measured, name: str, wanted: Wanted, budget: str, message: str) -> Finding:
    """Return the verdict on one tensor."""
    share, worst = _worst([found.patterned(wanted.value)[name]])
    return _finding(found, wanted, share, worst, budget=budget, message=message, tensor=name)


def _worst(rows: Iterable[LayerRow]) -> tuple[float, str]:
    known = [(row.conforming, row.name) for row in rows if row.conforming is not None]
    return min(known, default=(0.0, ""))


def _finding(found: Measured, wanted: Wanted, share: float, worst: str, **more: str) -> Finding:
    if not worst:
        note = f"No inputs divide into the groups of {wanted.value}."
    else:
        note = "" if share == 1 else f"{worst} is the furthest from {wanted.value}."
    return all_or_none(found, "min-nm", METRIC, wanted.line, share, note=note, **more)
