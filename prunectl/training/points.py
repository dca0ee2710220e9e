"""Points in time as users write them: `2000` steps, `20%` of all steps, `3ep`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import StrEnum

from prunectl.errors import UsageError

_POINT = re.compile(r"(\d+(?:\.\d+)?)\s*(%|ep|epochs?|steps?)?")


MOST_FREQUENCY = 100
"""Steps from one turn to the next on a long way, as in tfmot."""
_TURNS = 20
"""At least so many turns are taken on the way, however short it is."""


class Unit(StrEnum):
    """What a point is counted in."""

    STEPS = "steps"
    PERCENT = "%"
    EPOCHS = "ep"


@dataclass(frozen=True, slots=True)
class Point:
    """A point in the course of training, before it is known how long that is."""

    amount: float
    unit: Unit

    def step(self, steps: int, steps_per_epoch: int) -> int:
        """Return the step that it is; one step is one batch."""
        # Rounded before it is cut off: 0.29 * 100 is 28.999999999999996.
        if self.unit is Unit.PERCENT:
            return math.floor(round(self.amount * steps / 100, 6))
        if self.unit is Unit.EPOCHS:
            return math.floor(round(self.amount * steps_per_epoch, 6))
        return int(self.amount)


def parse_point(text: str) -> Point:
    """Return the point that is meant."""
    found = _POINT.fullmatch(text.strip())
    if found is None:
        raise UsageError(f"{text!r} is no point in time", hint="write 2000 (steps), 20% (of all steps) or 3ep (epochs)")
    amount, word = float(found[1]), found[2] or "steps"
    unit = Unit.PERCENT if word == "%" else Unit.EPOCHS if word.startswith("ep") else Unit.STEPS
    if unit is Unit.STEPS and not amount.is_integer():
        raise UsageError(f"{text!r} is no whole number of steps", hint="a share is written 20%")
    if unit is Unit.PERCENT and amount > 100:
        raise UsageError(f"{text} is more than all steps")
    return Point(amount, unit)


def usual_frequency(steps: int) -> int:
    """Return how many steps lie between two turns on a way of so many, if nobody says."""
    return max(min(MOST_FREQUENCY, steps // _TURNS), 1)
