"""How much worse may a model become?"""

from __future__ import annotations

from dataclasses import dataclass

from prunectl.errors import UsageError
from prunectl.sweeping.point import Outcome
from prunectl.training.better import is_higher_better

_DIGITS = 9
"""Differences are rounded, as 0.98 - 0.975 is more than 0.005."""


@dataclass(frozen=True, slots=True)
class MaxDrop:
    """The most that a metric may lose, or a loss may rise."""

    amount: float
    is_points: bool
    """Whether it was said in percentage points, which a share has."""


def gain(before: Outcome, after: Outcome) -> float:
    """Return by how much one model is better than another."""
    more = after.value - before.value
    return round(more if is_higher_better(before.metric) else -more, _DIGITS)


def drop(outcome: Outcome, base: Outcome) -> float:
    """Return by how much a model is worse than the one that it was made of."""
    return -gain(base, outcome) or 0.0


def is_share(outcome: Outcome) -> bool:
    """Whether the metric is a share of the examples, of which percentage points can be lost."""
    return is_higher_better(outcome.metric) and 0 <= outcome.value <= 1


def check(limit: MaxDrop, base: Outcome) -> None:
    """Refuse a limit that does not go with the metric."""
    shown = f"{100 * limit.amount if limit.is_points else limit.amount:g}"
    if limit.is_points and not is_share(base):
        raise UsageError(
            f"--max-drop {shown}pp is about a share, and {base.metric} is none ({base.value:.4g})",
            hint=f"write a number, such as --max-drop {base.value / 100:.2g}, or name another --metric",
        )
    if not limit.is_points and is_share(base):
        raise UsageError(
            f"--max-drop {shown} of {base.metric}: in which unit?", hint=f"write {shown}pp or {100 * limit.amount:g}pp"
        )
