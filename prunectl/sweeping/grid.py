"""Which ways are tried: every combination that makes sense, and why the others do not."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from itertools import product

from prunectl.analysis.patterns import CHANNEL, NMPattern
from prunectl.channels.config import KIND
from prunectl.channels.importance import MEASURES, RANDOM, Importance
from prunectl.errors import UsageError
from prunectl.plugins import find
from prunectl.pruning.plan import Scope
from prunectl.pruning.request import PruneRequest, parse_pattern
from prunectl.pruning.strategies import STRATEGIES, Strategy
from prunectl.sweeping.requests import ONE_SHOT, check_variant, training_of
from prunectl.sweeping.trial import BASELINE, SweepConfig, Trial, Variant
from prunectl.training.monitor import check_direction

UNSTRUCTURED = "unstructured"


def variants(choices: SweepConfig) -> list[Variant]:
    """Return every way in which a sparsity is to be reached."""
    return [way for way, reason in _combined(choices).items() if not reason]


def skipped_combinations(choices: SweepConfig) -> dict[Variant, str]:
    """Return what makes no sense together, and why."""
    return {way: reason for way, reason in _combined(choices).items() if reason}


def grid(choices: SweepConfig) -> list[Trial]:
    """Return the points that are asked for, the model as it is before them."""
    return [BASELINE, *(way.at(sparsity) for way in variants(choices) for sparsity in _sparsities(choices, way))]


def implied_sparsity(pattern: str) -> float | None:
    """Return the sparsity that a pattern decides by itself."""
    parsed = parse_pattern(PruneRequest(pattern=pattern))[0] if pattern != CHANNEL else None
    return parsed.zeros / parsed.group if isinstance(parsed, NMPattern) else None


def _sparsities(choices: SweepConfig, way: Variant) -> tuple[float, ...]:
    own = implied_sparsity(way.pattern)
    return choices.sparsities if own is None else (own,)


@cache
def _combined(choices: SweepConfig) -> Mapping[Variant, str]:
    """Return every combination, with the reason why it makes no sense or none."""
    reasons: dict[Variant, str] = {}
    first: UsageError | None = None
    for way in _product(choices):
        try:
            check_variant(choices, way.at(implied_sparsity(way.pattern) or 0.5))
        except UsageError as error:
            if not way.pattern and not way.params:
                # What was named for itself is meant.
                raise
            first = first or error
            reasons[way] = error.message
        else:
            reasons[way] = ""
    if first is not None and all(reasons.values()):
        raise first
    return reasons


def _product(choices: SweepConfig) -> list[Variant]:
    schedules = choices.schedules if choices.epochs else ("",)
    patterns = [pattern if pattern != UNSTRUCTURED else "" for pattern in choices.patterns]
    every = product(choices.strategies, choices.scopes, schedules, patterns)
    used: set[str] = set()
    combinations: list[Variant] = []
    for strategy, scope, schedule, pattern in every:
        accepted = [param for param in choices.params if accepts_param(strategy, pattern, param[0])]
        used |= {name for name, _ in accepted}
        for values in product(*(values for _, values in accepted)):
            settings = (f"{name}={value}" for (name, _), value in zip(accepted, values, strict=True))
            combinations.append(Variant(strategy, scope, schedule, pattern, ",".join(settings)))
    for name, _ in choices.params:
        if name not in used:
            raise UsageError(f"none of the strategies has a parameter {name}", hint="leave out --param, or name one")
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
        # Of no use to this pattern, which is said where the way is looked at.
        return False
    if isinstance(strategy_or_measure, Importance):
        return name == strategy_or_measure.key
    if isinstance(strategy_or_measure, Strategy):
        return name in strategy_or_measure.choices
    return callable(strategy_or_measure) and name in inspect.signature(strategy_or_measure).parameters


def check(choices: SweepConfig) -> None:
    """Refuse what contradicts itself."""
    if choices.val and choices.val_split:
        raise UsageError("--val and --val-split exclude each other")
    if choices.schedules != (ONE_SHOT,) and not choices.epochs:
        raise UsageError("a schedule needs training", hint="add --epochs 3, or leave out --schedules")
    for scope in choices.scopes:
        if scope not in set(Scope):
            raise UsageError(f"no scope is called {scope}", hint=f"known: {', '.join(Scope)}")
    variants(choices)
    check_direction(training_of(choices, BASELINE).means)
    for point in grid(choices)[1:]:
        if not 0 <= point.sparsity < 1:
            raise UsageError(f"a sparsity is a share from 0 up to 1, not {point.sparsity:g}", hint="write 0.8 or 80%")
