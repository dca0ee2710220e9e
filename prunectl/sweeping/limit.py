"""How much worse is what came of a point than the model as it is?"""

from __future__ import annotations

import math

from prunectl.sweeping.point import Outcome
from prunectl.training.judging import drop as drops
from prunectl.training.judging.drop import MaxDrop


def gain(before: Outcome, after: Outcome) -> float:
    """Return by how much one model is better than another."""
    return drops.gain(before.value, after.value, is_up=before.is_more_better)


def drop(outcome: Outcome, base: Outcome) -> float:
    """Return by how much a model is worse than the one that it was made of."""
    return -gain(base, outcome) or 0.0


def amount(difference: float, base: Outcome) -> str:
    """Return a difference as people read it."""
    return drops.amount(difference, base.value, is_up=base.is_more_better)


def finite(value: float) -> float | None:
    """Return a number, or nothing where it is none."""
    return value if math.isfinite(value) else None


def check(limit: MaxDrop, base: Outcome) -> None:
    """Refuse a limit that does not go with the metric."""
    drops.check(limit, base.metric, base.value, is_up=base.is_more_better)
