"""Which ways are tried: every combination that makes sense, and why the others do not."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from itertools import product

from prunectl.channels.plugged import KIND
from prunectl.channels.scores import MEASURES, RANDOM, Measure
from prunectl.errors import UsageError
from prunectl.measuring.patterns import CHANNELS, ZerosOf
from prunectl.plugins import find
from prunectl.pruning.request import Request, shape_of
from prunectl.pruning.strategies import STRATEGIES, Strategy
from prunectl.sweeping.choices import Choices
from prunectl.sweeping.point import BASE, Point, Way
from prunectl.sweeping.requests import check_way

UNSTRUCTURED = "unstructured"


def ways(choices: Choices) -> list[Way]:
    """Return every way in which a sparsity is to be reached."""
    return [way for way, reason in _combined(choices).items() if not reason]


def left_out(choices: Choices) -> dict[Way, str]:
    """Return what makes no sense together, and why."""
    return {way: reason for way, reason in _combined(choices).items() if reason}


def grid(choices: Choices) -> list[Point]:
    """Return the points that are asked for, the model as it is before them."""
    return [BASE, *(way.at(sparsity) for way in ways(choices) for sparsity in _sparsities(choices, way))]


def fixed(pattern: str) -> float | None:
    """Return the sparsity that a pattern decides by itself."""
    found = shape_of(Request(pattern=pattern))[0] if pattern != CHANNELS else None
    return found.zeros / found.group if isinstance(found, ZerosOf) else None


def _sparsities(choices: Choices, way: Way) -> tuple[float, ...]:
    own = fixed(way.pattern)
    return choices.sparsities if own is None else (own,)


@cache
def _combined(choices: Choices) -> Mapping[Way, str]:
    """Return every combination, with the reason why it makes no sense or none."""
    found: dict[Way, str] = {}
    first: UsageError | None = None
    for way in _every(choices):
        try:
            check_way(choices, way.at(fixed(way.pattern) or 0.5))
        except UsageError as error:
            if not way.pattern and not way.params:
                # What was named for itself is meant.
                raise
            first = first or error
            found[way] = error.message
        else:
            found[way] = ""
    if first is not None and all(found.values()):
        raise first
    return found


def _every(choices: Choices) -> list[Way]:
    schedules = choices.schedules if choices.epochs else ("",)
    patterns = [pattern if pattern != UNSTRUCTURED else "" for pattern in choices.patterns]
    every = product(choices.strategies, choices.scopes, schedules, patterns)
    used: set[str] = set()
    found: list[Way] = []
    for strategy, scope, schedule, pattern in every:
        known = [param for param in choices.params if takes(strategy, pattern, param[0])]
        used |= {name for name, _ in known}
        for values in product(*(values for _, values in known)):
            words = (f"{name}={value}" for (name, _), value in zip(known, values, strict=True))
            found.append(Way(strategy, scope, schedule, pattern, ",".join(words)))
    for name, _ in choices.params:
        if name not in used:
            raise UsageError(f"none of the strategies has a parameter {name}", hint="leave out --param, or name one")
    return list(dict.fromkeys(found))


def takes(strategy: str, pattern: str, name: str) -> bool:
    """Whether a strategy has a parameter of that name."""
    weights: dict[str, object] = {one.name: one for one in STRATEGIES}
    channels: dict[str, object] = {one.name: one for one in MEASURES} | {RANDOM: None, "magnitude": MEASURES[0]}
    try:
        found = find(KIND, strategy, channels) if pattern == CHANNELS else find("strategy", strategy, weights)
    except UsageError:
        # Of no use to this pattern, which is said where the way is looked at.
        return False
    if isinstance(found, Measure):
        return name == found.key
    if isinstance(found, Strategy):
        return name in found.choices
    return callable(found) and name in inspect.signature(found).parameters
