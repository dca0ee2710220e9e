"""Is one schedule better than another? Told by the points that differ in nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations

from prunectl.sweeping.choices import Choices
from prunectl.sweeping.limit import gain
from prunectl.sweeping.point import Outcome, Point


@dataclass(frozen=True, slots=True)
class Versus:
    """Two schedules, and how they compare."""

    one: str
    other: str
    gains: tuple[float, ...]
    """How much better the other is, pair by pair."""

    @property
    def mean(self) -> float:
        """How much better the other is on average."""
        return sum(self.gains) / len(self.gains)


def versus(choices: Choices, outcomes: Mapping[Point, Outcome]) -> list[Versus]:
    """Return how every two schedules compare that have points in common."""
    found: list[Versus] = []
    for one, other in combinations(choices.schedules if choices.epochs else (), 2):
        twins = {point: replace(point, schedule=other) for point in outcomes if point.schedule == one}
        pairs = [(outcomes[point], outcomes[twin]) for point, twin in twins.items() if twin in outcomes]
        pairs = [pair for pair in pairs if all(one.is_number for one in pair)]
        if pairs:
            found.append(Versus(one, other, tuple(gain(*pair) for pair in pairs)))
    return found
