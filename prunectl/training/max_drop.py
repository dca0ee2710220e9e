"""The maximum accuracy drop that the user allows (`--max-drop`)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from prunectl.errors import UsageError

POINTS = "pp"
_DIGITS = 9
"""Decimal places of differences: in floats, 0.98 - 0.975 is more than 0.005."""


@dataclass(frozen=True, slots=True)
class MaxDrop:
    """The maximum decrease of a metric, or increase of a loss."""

    amount: float
    is_points: bool
    """Whether it was given in percentage points, as is possible for a metric between 0 and 1."""

    @property
    def shown(self) -> str:
        """The drop as the user writes it."""
        return f"{100 * self.amount:g}{POINTS}" if self.is_points else f"{self.amount:g}"


_DROP_HINT = "write 0.5pp (percentage points), or 0.01 for a loss"


def parse_drop(text: str) -> MaxDrop:
    """Parse `--max-drop`: percentage points such as 0.5pp, or a number in the metric's own unit."""
    stripped = text.strip()
    is_points = stripped.endswith(POINTS)
    try:
        amount = float(stripped.removesuffix(POINTS))
    except ValueError:
        number = stripped.removesuffix("%")
        hint = f"write {number}pp for {number} percentage points" if number != stripped else _DROP_HINT
        raise UsageError(f"--max-drop {text!r} is not a drop", hint=hint) from None
    if not math.isfinite(amount) or amount < 0:
        raise UsageError(f"--max-drop {text!r} must be 0 or more")
    return MaxDrop(amount / 100 if is_points else amount, is_points)


def improvement(before: float, after: float, *, higher_is_better: bool) -> float:
    """How much better a metric became; negative if it became worse."""
    more = after - before
    return round(more if higher_is_better else -more, _DIGITS)


def is_fraction(value: float, *, higher_is_better: bool) -> bool:
    """Whether a metric is a fraction such as accuracy, so that percentage points make sense."""
    return higher_is_better and 0 <= value <= 1


def format_drop(difference: float, of: float, *, higher_is_better: bool) -> str:
    """Format a difference: in percentage points if the metric is a fraction."""
    return (
        f"{100 * difference:.3g} {POINTS}"
        if is_fraction(of, higher_is_better=higher_is_better)
        else f"{difference:.4g}"
    )


def check_max_drop(limit: MaxDrop, metric: str, value: float, *, higher_is_better: bool) -> None:
    """Refuse a limit whose unit does not fit the metric, given the metric's value before pruning."""
    if limit.is_points and not is_fraction(value, higher_is_better=higher_is_better):
        raise UsageError(
            f"--max-drop {limit.shown} needs a metric from 0 to 1, but {metric} is {value:.4g}",
            hint=f"write a number, such as {abs(value) / 100:.2g}, or choose another --metric",
        )
    if not limit.is_points and is_fraction(value, higher_is_better=higher_is_better):
        raise UsageError(
            f"--max-drop {limit.shown} has no unit, and {metric} is a share",
            hint=f"write {limit.shown}pp or {100 * limit.amount:g}pp",
        )
