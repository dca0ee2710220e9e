"""Bisection for the largest sparsity within a limit, after the trials of the grid."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from prunectl.sweeping.grid import grid, implied_sparsity, variants
from prunectl.sweeping.trial import BASELINE, SweepConfig, Trial, TrialResult, Variant
from prunectl.training import max_drop as drops
from prunectl.training.max_drop import MaxDrop


def gain(before: TrialResult, after: TrialResult) -> float:
    """By how much one model is better than another."""
    return drops.improvement(before.value, after.value, higher_is_better=before.higher_is_better)


def drop(result: TrialResult, base: TrialResult) -> float:
    """By how much a model is worse than the one that it was made of."""
    return -gain(base, result) or 0.0


def amount(difference: float, base: TrialResult) -> str:
    """A difference as people read it."""
    return drops.format_drop(difference, base.value, higher_is_better=base.higher_is_better)


def finite(value: float) -> float | None:
    """A number, or nothing where it is none."""
    return value if math.isfinite(value) else None


def check(limit: MaxDrop, base: TrialResult) -> None:
    """Refuse a limit that does not go with the metric."""
    drops.check_max_drop(limit, base.metric, base.value, higher_is_better=base.higher_is_better)


_STEP, _DIGITS = 0.01, 2
"""How closely a sparsity is searched for."""


@dataclass(frozen=True, slots=True)
class Bracket:
    """Bracket of the largest sparsity within the limit."""

    passing: float
    """0 is the model as it is."""
    failing: float
    """1 is no model at all."""

    @property
    def is_closed(self) -> bool:
        """Whether there is nothing in between that is worth a try."""
        return self.failing - self.passing < 1.5 * _STEP

    @property
    def middle(self) -> float:
        """The sparsity to try next."""
        return round((self.passing + self.failing) / 2, _DIGITS)


def next_trials(
    config: SweepConfig, done: Mapping[Trial, TrialResult], failed: Collection[Trial], max_drop: float | None
) -> list[Trial]:
    """Trials that can run now, in the order of the table."""
    trials = [trial for trial in grid(config) if trial not in done and trial not in failed]
    if max_drop is None or BASELINE in trials:
        return trials
    for variant in variants(config):
        if implied_sparsity(variant.pattern) is not None or any(
            trial.variant == variant for trial in (*trials, *failed)
        ):
            continue
        bracket = make_bracket(variant, done, max_drop)
        if not bracket.is_closed:
            trials.append(variant.trial(bracket.middle))
    return trials


def make_bracket(variant: Variant, done: Mapping[Trial, TrialResult], max_drop: float) -> Bracket:
    """The bracket of a variant from all its finished trials."""
    base = done[BASELINE]
    within_limit = {
        trial.sparsity: drop(result, base) <= max_drop for trial, result in done.items() if trial.variant == variant
    }
    passing = max((sparsity for sparsity, is_within in within_limit.items() if is_within), default=0.0)
    failing = min(
        (sparsity for sparsity, is_within in within_limit.items() if not is_within and sparsity > passing), default=1.0
    )
    return Bracket(passing, failing)
