"""Timing in turns: intervals that hold what they promise, and no verdict that the noise has given."""

from __future__ import annotations

import gc
from collections import Counter

import numpy as np
import pytest

from prunectl.analysis.timing import Verdict, measure, summarise


class Machine:
    """A clock that only runs move, so that a test takes no time and knows every sample."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now

    def run(self, name: str, seconds: float) -> None:
        self.order.append(name)
        self.now += seconds


def rounds(seed: int, *, factor: float = 1.0, noise: float = 0.05, busy: float = 0.0, count: int = 200) -> np.ndarray:
    """Samples of two runs; a busy machine makes both slower for a while, one after the other."""
    random = np.random.default_rng(seed)
    load = np.repeat(random.random(count // 10 + 1) < busy, 10)[:count, None] * random.uniform(0.2, 2.0, (count, 2))
    seconds = 1e-3 * np.array([1.0, 1 / factor]) * np.exp(noise * random.standard_normal((count, 2))) * (1 + load)
    return np.asarray(seconds)


def verdicts(**settings: float) -> Counter[Verdict]:
    return Counter(summarise(rounds(seed, **settings), seed)[1].verdict for seed in range(40))  # type: ignore[arg-type]


@pytest.mark.parametrize("busy", [0.0, 0.3, 0.6])
def test_two_alike_are_hardly_ever_told_apart_even_on_a_busy_machine(busy: float) -> None:
    told = verdicts(busy=busy)
    assert told[Verdict.FASTER] + told[Verdict.SLOWER] <= 1
    assert told[Verdict.SAME] >= 24 or busy


def test_what_is_a_tenth_faster_or_slower_is_told() -> None:
    assert verdicts(factor=1.1)[Verdict.FASTER] >= 38
    assert verdicts(factor=1 / 1.1)[Verdict.SLOWER] >= 38


def test_a_difference_too_small_to_matter_is_none() -> None:
    assert verdicts(factor=1.01, noise=0.01) == {Verdict.SAME: 40}


def test_noise_larger_than_the_difference_leaves_it_open() -> None:
    told = verdicts(factor=1.05, noise=0.6, count=30)
    assert told[Verdict.UNCLEAR] >= 36


def test_intervals_hold_the_true_median_as_often_as_they_say() -> None:
    holds = sum(
        latency[0].median.low <= 1e-3 <= latency[0].median.high
        and latency[1].speedup.low <= 1.2 <= latency[1].speedup.high
        for seed in range(60)
        for latency in [summarise(rounds(seed, factor=1.2), seed)]
    )
    # Both of two: 54 of 60 if they were independent.
    assert holds >= 51


def test_medians_are_those_of_numpy() -> None:
    samples = rounds(3, factor=1.5)
    first, second = summarise(samples)
    assert first.median.middle == np.median(samples[:, 0])
    assert first.minimum == samples[:, 0].min()
    assert second.speedup.middle == pytest.approx(np.exp(np.median(np.log(samples[:, 0] / samples[:, 1]))))
    assert (first.speedup.low, first.speedup.middle, first.speedup.high) == (1, 1, 1)


def test_of_few_rounds_the_interval_has_all() -> None:
    samples = rounds(1, count=6)
    median = summarise(samples)[1].median
    assert (median.low, median.high) == (samples[:, 1].min(), samples[:, 1].max())


def test_runs_take_turns_in_another_order_each_time() -> None:
    machine = Machine()
    first, second = measure([lambda: machine.run("a", 0.03), lambda: machine.run("b", 0.01)], seconds=60, clock=machine)
    assert first.median.middle == pytest.approx(0.03)
    assert second.speedup.middle == pytest.approx(3)
    # Nothing varies, and so the first look is the last.
    assert first.samples == 20
    turns = [tuple(machine.order[-40:][at : at + 2]) for at in range(0, 40, 2)]
    assert set(turns) == {("a", "b"), ("b", "a")}


def test_short_runs_are_repeated_until_the_clock_can_tell_them() -> None:
    machine = Machine()
    (latency,) = measure([lambda: machine.run("a", 1e-6)], seconds=60, clock=machine)
    assert latency.median.middle == pytest.approx(1e-6)
    # 2 ms for each of 20 samples, after at least 0.2 s to warm up.
    assert len(machine.order) >= 20 * 2000 + 200_000


def test_what_varies_is_sampled_until_the_time_is_over() -> None:
    machine, random = Machine(), np.random.default_rng(0)
    latencies = measure(
        [lambda: machine.run("a", random.uniform(0.01, 0.2)), lambda: machine.run("b", random.uniform(0.01, 0.2))],
        seconds=10,
        clock=machine,
    )
    warm_up = 10.0 + 1.0
    assert machine.now < warm_up + 1.0
    assert latencies[1].verdict is Verdict.UNCLEAR


def test_of_what_takes_minutes_six_rounds_are_run() -> None:
    machine = Machine()
    (latency,) = measure([lambda: machine.run("a", 100)], seconds=10, clock=machine)
    assert latency.samples == 6


def test_the_collector_is_off_meanwhile_and_on_again() -> None:
    machine, seen = Machine(), set()

    def run() -> None:
        seen.add(gc.isenabled())
        machine.run("a", 1.0)

    measure([run], seconds=1, clock=machine)
    assert seen == {False}
    assert gc.isenabled()
