"""What goes first? Functions from weights to scores: the lowest scores are dropped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a block of weights stands, for strategies that need to know."""

    name: str
    """The tensor."""
    begin: int
    """Index of the block's first element in the tensor."""
    seed: int


Score = Callable[[Array, Place], Array]


@dataclass(frozen=True, slots=True)
class Strategy:
    """A way to score weights."""

    name: str
    score: Score
    line: str
    """What it does, in a line."""
    is_elementwise: bool = True
    """Whether a weight's score depends on that weight alone, so that blocks can be scored one by one."""
    params: Mapping[str, Any] = field(default_factory=dict)


def magnitude(weights: Array, _: Place) -> Array:
    """Score each weight by its absolute value."""
    wide = weights.astype(np.float32, copy=False) if weights.dtype.itemsize < 4 else weights
    return np.asarray(np.abs(wide))


def lamp(weights: Array, place: Place) -> Array:
    """Score each weight by its square over the sum of the squares of those that are not smaller (Lee et al. 2021)."""
    squares = np.square(magnitude(weights, place).astype(np.float64)).reshape(-1)
    order = np.argsort(squares, kind="stable")
    rising = squares[order]
    remaining = np.cumsum(rising[::-1])[::-1]
    scores = np.empty_like(squares)
    scores[order] = np.divide(rising, remaining, out=np.zeros_like(rising), where=remaining > 0)
    return scores.reshape(weights.shape)


def random(weights: Array, place: Place) -> Array:
    """Score each weight by a number that only its place and the seed decide."""
    indices = np.arange(place.begin, place.begin + weights.size, dtype=np.uint64)
    mixed = _mixed(indices + np.uint64(_hashed(f"{place.seed}/{place.name}")))
    # The upper 24 bits are as many as a float32 holds exactly.
    return (mixed >> np.uint64(40)).astype(np.float32).reshape(weights.shape)


def _mixed(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return each number's splitmix64, in which every bit depends on every bit."""
    with np.errstate(over="ignore"):
        mixed = numbers * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _hashed(text: str) -> int:
    """Return the FNV-1a hash of a text, in 62 bits to leave room for indices."""
    found = 0xCBF29CE484222325
    for byte in text.encode():
        found = (found ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return found >> 2


STRATEGIES = (
    Strategy("magnitude", magnitude, "the smallest absolute values"),
    Strategy("random", random, "any, decided by the seed"),
    Strategy("random-weighted", random, "any, more of them in early or in late layers, decided by the seed"),
    Strategy("lamp", lamp, "the smallest shares of what is left of their layer", is_elementwise=False),
)
