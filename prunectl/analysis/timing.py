"""Measurement of latency: runs are interleaved until confidence intervals are narrow; verdicts allow for noise."""

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
"""A single run, its inputs prepared beforehand."""
Clock = Callable[[], float]
"""Returns the time in seconds."""

_SAMPLE = 2e-3
"""Shortest sample in seconds: shorter runs are repeated, and their mean is the sample."""
_WARM_RUNS, _WARM_SECONDS = 3, 0.2
"""Warm-up of each run before its first sample, for compilers, caches and thread pools."""
_FEWEST, _LEAST, _MOST = 6, 20, 5000
"""Numbers of rounds, in each of which every run is sampled once. The true median lies between the smallest and the
largest of six samples in 97 of 100 cases; with 20 or more samples, the interval is bootstrapped. The last number is the
most rounds that are run."""
_LOOK = 1.3
"""Factor between the numbers of rounds at which the intervals are computed, because that takes time too."""
_NARROW, _NARROW_SPEEDUP = 0.02, 0.01
"""Half-width of an interval, as a share of its middle, below which no more rounds are run."""
_RESAMPLES = 500
_CONFIDENCE = 97.0
"""Nominal level of a real 95 %: for the median of few samples, bootstrap intervals cover about 2 % too little."""
MARGIN = 0.02
"""Speed-ups below this count as the same: the place in memory of two copies of a file makes such a difference."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its 95 % confidence interval."""

    middle: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """Half the width, as a share of the middle."""
        return (self.high - self.low) / 2 / self.middle


class Verdict(StrEnum):
    """Comparison of a run with the first run."""

    FASTER = "faster"
    SLOWER = "slower"
    SAME = "same"
    """The whole interval of the speed-up is close to 1."""
    UNCLEAR = "unclear"
    """The noise is larger than the difference."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Latency of a run, in seconds."""

    median: Interval
    minimum: float
    samples: int
    speedup: Interval
    """How many times as fast as the first run; exactly 1 for the first run itself."""

    @property
    def verdict(self) -> Verdict:
        """FASTER or SLOWER only if the whole interval of the speed-up is."""
        if self.speedup.low > 1 + MARGIN:
            return Verdict.FASTER
        if self.speedup.high < 1 / (1 + MARGIN):
            return Verdict.SLOWER
        is_near = self.speedup.low >= 1 / (1 + 2 * MARGIN) and self.speedup.high <= 1 + 2 * MARGIN
        return Verdict.SAME if is_near else Verdict.UNCLEAR


def measure(
    runs: Sequence[Timed], *, seconds: float, seed: int = 0, clock: Clock = perf_counter
) -> tuple[Latency, ...]:
    """Time all runs in rounds, each in another random order, until the intervals are narrow or the time is over.

    Other load on the machine affects all runs alike, as a speed-up is the median of the ratios within a round.
    At least six rounds are run, even if that takes longer than `seconds`.
    """
    random = np.random.default_rng(seed)
    # No garbage collection in the middle of a sample.
    with uncollected():
        repeats = [_warm_up(run, clock) for run in runs]
        rounds: list[list[float]] = []
        began, next_look = clock(), _LEAST
        while len(rounds) < _FEWEST or (len(rounds) < _MOST and clock() - began < seconds):
            seconds_taken = [0.0] * len(runs)
            for index in random.permutation(len(runs)):
                seconds_taken[index] = _sample(runs[index], repeats[index], clock)
            rounds.append(seconds_taken)
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

    Consecutive rounds are correlated when a machine is busy for a while. Therefore blocks of rounds are drawn (circular
    block bootstrap, Politis and Romano 1992), whose length is the cube root of the number of rounds.
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
    """Run until caches are warm; return the number of runs in a sample."""
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
