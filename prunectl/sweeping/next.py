"""Which points are to be made next? Those of the grid, then those that close in on the largest sparsity that holds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from prunectl.sweeping.choices import Choices
from prunectl.sweeping.combined import fixed, grid, ways
from prunectl.sweeping.limit import drop
from prunectl.sweeping.point import BASE, Outcome, Point, Way

_STEP, _DIGITS = 0.01, 2
"""How closely a sparsity is searched for."""


@dataclass(frozen=True, slots=True)
class Bracket:
    """What is known of the largest sparsity that holds: it lies between two points."""

    holds: float
    """0 is the model as it is."""
    fails: float
    """1 is no model at all."""

    @property
    def is_closed(self) -> bool:
        """Whether there is nothing in between that is worth a try."""
        return self.fails - self.holds < 1.5 * _STEP

    @property
    def middle(self) -> float:
        """The sparsity to try next."""
        return round((self.holds + self.fails) / 2, _DIGITS)


def wanted(
    choices: Choices, done: Mapping[Point, Outcome], failed: Collection[Point], max_drop: float | None
) -> list[Point]:
    """Return the points that can be made now, in the order in which the table has them."""
    asked = [point for point in grid(choices) if point not in done and point not in failed]
    if max_drop is None or BASE in asked:
        return asked
    for way in ways(choices):
        if fixed(way.pattern) is not None or any(point.way == way for point in (*asked, *failed)):
            continue
        found = bracket(way, done, max_drop)
        if not found.is_closed:
            asked.append(way.at(found.middle))
    return asked


def bracket(way: Way, done: Mapping[Point, Outcome], max_drop: float) -> Bracket:
    """Return what all points of a way say: also those that were made for another question."""
    base = done[BASE]
    held = {point.sparsity: drop(outcome, base) <= max_drop for point, outcome in done.items() if point.way == way}
    holds = max((sparsity for sparsity, is_held in held.items() if is_held), default=0.0)
    fails = min((sparsity for sparsity, is_held in held.items() if not is_held and sparsity > holds), default=1.0)
    return Bracket(holds, fails)
