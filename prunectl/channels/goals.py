"""How small is a network to be? In parameters, in multiply-adds, or in compressed bytes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from prunectl.errors import UsageError, WorkError

_POWERS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


class What(StrEnum):
    """What is counted."""

    PARAMS = "parameters"
    FLOPS = "FLOPs"
    GZIP = "gzipped bytes"


@dataclass(frozen=True, slots=True)
class Goal:
    """How much of something may be left: a number, or a share of what there was."""

    what: What
    number: int = 0
    share: float | None = None

    def limit(self, before: int) -> int:
        """Return how much may be left."""
        return self.number if self.share is None else int(self.share * before)


def goal_of(what: What, text: str) -> Goal:
    """Return what `-50%`, `1.5M` or `200000` ask for."""
    found = re.fullmatch(r"-(\d+(?:\.\d+)?)%", text.strip())
    if found is not None and float(found[1]) <= 100:
        return Goal(what, share=1 - float(found[1]) / 100)
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg]?)", text.strip().lower())
    if found is None:
        raise UsageError(f"{text!r} is no number of {what}", hint="write -50% for half of it, or how many: 1.5M")
    return Goal(what, number=int(float(found[1]) * _POWERS[found[2]]))


def least(goal: Goal, before: int, channels: int, left: Callable[[float], int], tries: int) -> float:
    """Return the smallest share of so many channels that reaches a goal, as far as so many tries can tell."""
    limit = goal.limit(before)
    if before <= limit:
        return 0.0
    reached = left(1.0)
    if reached > limit:
        raise WorkError(
            f"{limit:,} {goal.what} are out of reach: without all channels that may go, {reached:,} are left",
            hint="let smaller layers stay: --min-channels 1; or see what is locked: prunectl inspect MODEL --groups",
        )
    low, high = 0, channels
    while high - low > 1 and tries:
        middle = (low + high) // 2
        if left(middle / channels) <= limit:
            high = middle
        else:
            low = middle
        tries -= 1
    return high / channels
