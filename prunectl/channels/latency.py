"""How long does a network take for one example, before a cut and after?"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import numpy as np

from prunectl.channels.source import Feeds, Runner, Source

_SECONDS = 2.0
"""How long the two are run at most, in turns, so that what else the machine does falls on both."""
_RUNS = 50
_WARM = 2


def latency(source: Source, smaller: Any, seed: int) -> tuple[float, float]:
    """Return the median seconds of a run of both networks in their own runtime."""
    feeds = source.feeds(np.random.default_rng(seed))
    runners = (source.runner(source.with_weights({}), ()), source.runner(smaller, ()))
    for run in runners * _WARM:
        run(feeds)
    taken: tuple[list[float], list[float]] = ([], [])
    began = time.perf_counter()
    while len(taken[0]) < _RUNS and (not taken[1] or time.perf_counter() - began < _SECONDS):
        for run, seconds in zip(runners, taken, strict=True):
            seconds.append(_timed(run, feeds))
    return median(taken[0]), median(taken[1])


def _timed(run: Runner, feeds: Feeds) -> float:
    began = time.perf_counter()
    run(feeds)
    return time.perf_counter() - began
