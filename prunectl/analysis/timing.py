"""How long a run takes: in turns, until the interval is narrow enough, and no verdict that the noise may have given."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from prunectl.formats.registry import uncollected

if TYPE_CHECKING:
    from prunectl.formats.base import Array

Timed = Callable[[], object]
"""A single run, its inputs made ready before."""
Clock = Callable[[], float]
"""What time it is, in seconds."""

_SAMPLE = 2e-3
"""Seconds of a sample at least: shorter runs are repeated, and their mean taken."""
_WARM_RUNS, _WARM_SECONDS = 3, 0.2
"""Of each before the first sample: compilers, caches and thread pools start."""
_FEWEST, _LEAST, _MOST = 6, 20, 5000
"""Rounds, in each of which everything is sampled once. The median of six lies between the least and the most of them
in 97 of 100 cases; from 20 on, they are drawn from."""
_LOOK = 1.3
"""By how much more rounds each look at the intervals waits, as looking takes time too."""
_NARROW, _NARROW_SPEEDUP = 0.02, 0.01
"""The half of an interval, as a share of its middle, at which more rounds tell nothing new."""
_RESAMPLES = 500
_CONFIDENCE = 97.0
"""What holds 95 of 100 times: of a median of few samples, the bootstrap falls short by about two."""
MARGIN = 0.02
"""Less than this is called the same: the place in memory of two copies of a file makes as much of a difference."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A number, and where it lies with 95 % confidence."""

    middle: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """Half the width, as a share of the middle."""
        return (self.high - self.low) / 2 / self.middle


class Verdict(StrEnum):
    """How a run compares with the first."""

    FASTER = "faster"
    SLOWER = "slower"
    SAME = "same"
    """The whole interval is too near to one to matter."""
    UNCLEAR = "unclear"
    """The noise is larger than the difference."""


@dataclass(frozen=True, slots=True)
class Latency:
    """How long a run takes, in seconds."""

    median: Interval
    minimum: float
    samples: int
    speedup: Interval
    """How many times as fast as the first; exactly 1 for itself."""

    @property
    def verdict(self) -> Verdict:
        """Faster or slower only where the whole interval says so."""
        if self.speedup.low > 1 + MARGIN:
            return Verdict.FASTER
        if self.speedup.high < 1 / (1 + MARGIN):
            return Verdict.SLOWER
        is_near = self.speedup.low >= 1 / (1 + 2 * MARGIN) and self.speedup.high <= 1 + 2 * MARGIN
        return Verdict.SAME if is_near else Verdict.UNCLEAR


def measure(
    runs: Sequence[Timed], *, seconds: float, seed: int = 0, clock: Clock = perf_counter
) -> tuple[Latency, ...]:
    """Time all runs in turns, in each round in another order, until the intervals are narrow or the time is over.

    What else the machine does falls on all of them alike, and a speed-up is the median of the ratios within a round.
    Of what takes long, six rounds are run, however many seconds that may be.
    """
    random = np.random.default_rng(seed)
    # Garbage is not looked for in the middle of a sample.
    with uncollected():
        repeats = [_warm_up(run, clock) for run in runs]
        rounds: list[list[float]] = []
        began, next_look = clock(), _LEAST
        while len(rounds) < _FEWEST or (len(rounds) < _MOST and clock() - began < seconds):
            taken = [0.0] * len(runs)
            for index in random.permutation(len(runs)):
                taken[index] = _sample(runs[index], repeats[index], clock)
            rounds.append(taken)
            if len(rounds) >= next_look:
                next_look = math.ceil(len(rounds) * _LOOK)
                latencies = summarise(np.array(rounds), seed)
                if all(map(_is_narrow, latencies)):
                    return latencies
    return summarise(np.array(rounds), seed)


def _is_narrow(latency: Latency) -> bool:
    return latency.median.spread < _NARROW and latency.speedup.spread < _NARROW_SPEEDUP


def summarise(rounds: Array, seed: int = 0) -> tuple[Latency, ...]:
    """The latency of each run from samples (round, run), with bootstrapped intervals.

    Rounds that follow each other are alike where a machine is busy for a while, and so blocks of them are drawn, around
    the end too (circular block bootstrap, Politis and Romano 1992), of the cube root of their number.
    """
    count = len(rounds)
    length = round(count ** (1 / 3))
    random = np.random.default_rng(seed)
    starts = random.integers(0, count, (_RESAMPLES, -(-count // length)))
    drawn = ((starts[..., None] + np.arange(length)) % count).reshape(_RESAMPLES, -1)[:, :count]
    ratios = np.log(rounds[:, :1]) - np.log(rounds)
    latencies = []
    for index in range(rounds.shape[1]):
        speedup = _interval(ratios[:, index], drawn)
        latencies.append(
            Latency(
                _interval(rounds[:, index], drawn),
                float(rounds[:, index].min()),
                count,
                Interval(*(math.exp(value) for value in (speedup.middle, speedup.low, speedup.high))),
            )
        )
    return tuple(latencies)


def _interval(values: Array, drawn: Array) -> Interval:
    if len(values) < _LEAST:
        low, high = values.min(), values.max()
    else:
        tail = (100 - _CONFIDENCE) / 2
        low, high = np.percentile(np.median(values[drawn], axis=1), [tail, 100 - tail])
    return Interval(float(np.median(values)), float(low), float(high))


def _warm_up(run: Timed, clock: Clock) -> int:
    """Run until nothing is made ready any more; return how many runs make a sample."""
    fastest, began, count = math.inf, clock(), 0
    while count < _WARM_RUNS or clock() - began < _WARM_SECONDS:
        fastest = min(fastest, _sample(run, 1, clock))
        count += 1
    return max(1, math.ceil(_SAMPLE / max(fastest, 1e-9)))


def _sample(run: Timed, repeats: int, clock: Clock) -> float:
    began = clock()
    for _ in range(repeats):
        run()
    return (clock() - began) / repeats
