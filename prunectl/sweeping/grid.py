"""Which trials run: the grid of valid variants, then bisection for the largest sparsity within a limit."""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product

from prunectl.analysis.patterns import CHANNEL, NMPattern
from prunectl.channels.config import KIND
from prunectl.channels.importance import MEASURES, RANDOM, Importance
from prunectl.errors import UsageError
from prunectl.plugins import find
from prunectl.pruning.plan import Scope
from prunectl.pruning.request import UNSTRUCTURED, PruneRequest, default_scope, parse_pattern
from prunectl.pruning.strategies import STRATEGIES, Strategy
from prunectl.sweeping.requests import ONE_SHOT, check_variant, training_of
from prunectl.sweeping.trial import BASELINE, SweepConfig, Trial, TrialResult, Variant
from prunectl.training import max_drop as drops
from prunectl.training.max_drop import MaxDrop
from prunectl.training.monitor import check_direction


def variants(config: SweepConfig) -> list[Variant]:
    """All variants to try."""
    return [variant for variant, reason in _skip_reasons(config).items() if not reason]


def skipped_combinations(config: SweepConfig) -> dict[Variant, str]:
    """Combinations that are skipped, and why."""
    return {variant: reason for variant, reason in _skip_reasons(config).items() if reason}


def grid(config: SweepConfig) -> list[Trial]:
    """Trials of the grid, the baseline first."""
    return [
        BASELINE,
        *(variant.trial(sparsity) for variant in variants(config) for sparsity in _sparsities(config, variant)),
    ]


def implied_sparsity(pattern: str) -> float | None:
    """The sparsity that an N:M pattern implies; None for other patterns."""
    parsed = parse_pattern(PruneRequest(pattern=pattern))[0] if pattern != CHANNEL else None
    return parsed.zeros / parsed.group if isinstance(parsed, NMPattern) else None


def _sparsities(config: SweepConfig, variant: Variant) -> tuple[float, ...]:
    own = implied_sparsity(variant.pattern)
    return config.sparsities if own is None else (own,)


@cache
def _skip_reasons(config: SweepConfig) -> Mapping[Variant, str]:
    """Every combination, with the reason why it is skipped, or an empty string."""
    reasons: dict[Variant, str] = {}
    first: UsageError | None = None
    for variant in _product(config):
        try:
            check_variant(config, variant.trial(implied_sparsity(variant.pattern) or 0.5))
        except UsageError as error:
            if not variant.pattern and not variant.params:
                # Only combinations with a pattern or parameters may be skipped; others are the user's explicit choice.
                raise
            first = first or error
            reasons[variant] = error.message
        else:
            reasons[variant] = ""
    if first is not None and all(reasons.values()):
        raise first
    return reasons


def _product(config: SweepConfig) -> list[Variant]:
    schedules = config.schedules if config.epochs else ("",)
    patterns = [pattern if pattern != UNSTRUCTURED else "" for pattern in config.patterns]
    every = product(config.strategies, config.scopes, schedules, patterns)
    used: set[str] = set()
    combinations: list[Variant] = []
    for strategy, scope, schedule, pattern in every:
        ranked = default_scope(strategy, pattern) if scope == Scope.AUTO else scope
        accepted = [param for param in config.params if accepts_param(strategy, pattern, param[0])]
        used |= {name for name, _ in accepted}
        for values in product(*(values for _, values in accepted)):
            settings = (f"{name}={value}" for (name, _), value in zip(accepted, values, strict=True))
            combinations.append(Variant(strategy, ranked, schedule, pattern, ",".join(settings)))
    for name, _ in config.params:
        if name not in used:
            raise UsageError(
                f"none of the strategies has a parameter {name}",
                hint="leave out --param, or use a parameter of one of the strategies",
            )
    return list(dict.fromkeys(combinations))


def accepts_param(strategy: str, pattern: str, name: str) -> bool:
    """Whether a strategy has a parameter of that name."""
    weights: dict[str, object] = {item.name: item for item in STRATEGIES}
    channels: dict[str, object] = {item.name: item for item in MEASURES} | {RANDOM: None, "magnitude": MEASURES[0]}
    try:
        strategy_or_measure = (
            find(KIND, strategy, channels) if pattern == CHANNEL else find("strategy", strategy, weights)
        )
    except UsageError:
        # The strategy does not work with this pattern, which check_variant reports.
        return False
    if isinstance(strategy_or_measure, Importance):
        return name == strategy_or_measure.key
    if isinstance(strategy_or_measure, Strategy):
        return name in strategy_or_measure.choices
    return callable(strategy_or_measure) and name in inspect.signature(strategy_or_measure).parameters


def check(config: SweepConfig) -> None:
    """Refuse options that are invalid or contradict each other."""
    if config.val and config.val_split:
        raise UsageError("--val and --val-split cannot be used together")
    if config.schedules != (ONE_SHOT,) and not config.epochs:
        raise UsageError("--schedules needs training", hint="add --epochs 3, or leave out --schedules")
    for scope in config.scopes:
        if scope not in set(Scope):
            raise UsageError(f"{scope} is not a known scope", hint=f"known: {', '.join(Scope)}")
    variants(config)
    check_direction(training_of(config, BASELINE).means)
    for trial in grid(config)[1:]:
        if not 0 <= trial.sparsity < 1:
            raise UsageError(f"the sparsity must be from 0 to below 1, not {trial.sparsity:g}", hint="write 0.8 or 80%")


def gain(before: TrialResult, after: TrialResult) -> float:
    """By how much the metric of `after` is better than that of `before`."""
    return drops.improvement(before.value, after.value, higher_is_better=before.higher_is_better)


def drop(result: TrialResult, base: TrialResult) -> float:
    """By how much the metric of a result is worse than that of the baseline."""
    return -gain(base, result) or 0.0


def amount(difference: float, base: TrialResult) -> str:
    """A difference of the metric, formatted for users."""
    return drops.format_drop(difference, base.value, higher_is_better=base.higher_is_better)


def finite(value: float) -> float | None:
    """The value, or None if it is not finite."""
    return value if math.isfinite(value) else None


def check_limit(limit: MaxDrop, base: TrialResult) -> None:
    """Refuse a limit that does not fit the metric."""
    drops.check_max_drop(limit, base.metric, base.value, higher_is_better=base.higher_is_better)


_STEP, _DIGITS = 0.01, 2
"""Resolution of the search for a sparsity, and its number of decimals."""


@dataclass(frozen=True, slots=True)
class Bracket:
    """Bracket of the largest sparsity within the limit."""

    passing: float
    """Largest sparsity that is within the limit; 0 is the unpruned model."""
    failing: float
    """Smallest sparsity above it that is not within the limit; 1 if there is none."""

    @property
    def is_closed(self) -> bool:
        """Whether no sparsity in between is worth a trial."""
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
