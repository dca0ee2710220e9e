"""Which points are to be made next? Those of the grid, then those that close in on the largest sparsity that holds."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from prunectl.sweeping.grid import grid, implied_sparsity, variants
from prunectl.sweeping.trial import BASELINE, SweepConfig, Trial, TrialResult, Variant
from prunectl.training.evaluation import max_drop as drops
from prunectl.training.evaluation.max_drop import MaxDrop


def gain(before: TrialResult, after: TrialResult) -> float:
    """Return by how much one model is better than another."""
    return drops.gain(before.value, after.value, is_up=before.is_more_better)


def drop(outcome: TrialResult, base: TrialResult) -> float:
    """Return by how much a model is worse than the one that it was made of."""
    return -gain(base, outcome) or 0.0


def amount(difference: float, base: TrialResult) -> str:
    """Return a difference as people read it."""
    return drops.amount(difference, base.value, is_up=base.is_more_better)


def finite(value: float) -> float | None:
    """Return a number, or nothing where it is none."""
    return value if math.isfinite(value) else None


def check(limit: MaxDrop, base: TrialResult) -> None:
    """Refuse a limit that does not go with the metric."""
    drops.check(limit, base.metric, base.value, is_up=base.is_more_better)


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


def next_trials(
    choices: SweepConfig, done: Mapping[Trial, TrialResult], failed: Collection[Trial], max_drop: float | None
) -> list[Trial]:
    """Return the points that can be made now, in the order in which the table has them."""
    trials = [point for point in grid(choices) if point not in done and point not in failed]
    if max_drop is None or BASELINE in trials:
        return trials
    for way in variants(choices):
        if implied_sparsity(way.pattern) is not None or any(point.way == way for point in (*trials, *failed)):
            continue
        bracket = make_bracket(way, done, max_drop)
        if not bracket.is_closed:
            trials.append(way.at(bracket.middle))
    return trials


def make_bracket(way: Variant, done: Mapping[Trial, TrialResult], max_drop: float) -> Bracket:
    """Return what all points of a way say: also those that were made for another question."""
    base = done[BASELINE]
    within_limit = {
        point.sparsity: drop(outcome, base) <= max_drop for point, outcome in done.items() if point.way == way
    }
    holds = max((sparsity for sparsity, is_within in within_limit.items() if is_within), default=0.0)
    fails = min(
        (sparsity for sparsity, is_within in within_limit.items() if not is_within and sparsity > holds), default=1.0
    )
    return Bracket(holds, fails)
