"""Latency as a budget: models measured as `bench` does, judged by the interval. Loaded only where a budget asks."""

from __future__ import annotations

import os
from pathlib import Path

from prunectl.checks.accuracy import RunningChecker
from prunectl.checks.lazy_stats import LazyModelStats
from prunectl.checks.parse import Budget, LatencyRule
from prunectl.checks.rules import Finding, evaluate_limit
from prunectl.checks.schema import MetricUnit
from prunectl.errors import WorkError
from prunectl.exporting.bench import Benchmark, BenchRequest, bench, parse_request
from prunectl.units import duration


class LatencyChecker(RunningChecker):
    """How fast models are, each measured once with the same options."""

    def check(self, stats: LazyModelStats, *, rule: LatencyRule, budget: Budget) -> Finding:
        """Evaluate max-latency or min-speedup; an error names its line in the config."""
        with self._at(rule.limit.line):
            return self._check(stats, rule, budget)

    def _check(self, stats: LazyModelStats, rule: LatencyRule, budget: Budget) -> Finding:
        limit, is_speedup = rule.limit, rule.limit.metric is MetricUnit.FACTOR
        against = (os.path.relpath(self._folder / rule.against),) if rule.against else ()
        benchmark = self._measure((*against, stats.name), self._request(rule))
        ((size, latencies),) = benchmark.latencies.items()
        interval = latencies[-1].speedup if is_speedup else latencies[-1].median
        low, high = (f"{value:.2f}" if is_speedup else duration(value) for value in (interval.low, interval.high))
        if limit.fail is not None and _is_hidden(interval.low, interval.high, limit.fail, is_floor=is_speedup):
            said = f"it is {low} to {high} times as fast" if is_speedup else f"a run takes {low} to {high}"
            bound = f"{limit.fail:g}" if is_speedup else duration(limit.fail)
            raise WorkError(
                f"{stats.name} cannot be judged: {said}, too near {limit.name} = {bound}",
                hint="measure longer with seconds = 30, or while the machine does nothing else",
            )
        note = f"The 95 % interval is {low} to {high} ({benchmark.models[-1].runtime}, batch size {size}"
        note += f", threads {benchmark.threads})."
        metric = "speedup" if is_speedup else "seconds"
        return evaluate_limit(
            stats.name, metric, interval.middle, limit, budget=budget.name, message=budget.message, note=note
        )

    def _measure(self, names: tuple[str, ...], request: BenchRequest) -> Benchmark:
        return self._once((names, request), lambda key: bench(list(map(Path, key[0])), key[1]))

    def _request(self, rule: LatencyRule) -> BenchRequest:
        self._check_code(rule.data, (rule.model, rule.custom_objects), rule.limit.name)
        size = {} if rule.batch_size is None else {"batch_size": str(rule.batch_size)}
        return parse_request(
            {
                **size,
                "threads": rule.threads,
                "seconds": rule.seconds,
                "input": (rule.input,) if rule.input else (),
                "data": self._resolve(rule.data),
                "builder": self._resolve(rule.model),
                "custom_objects": self._resolve(rule.custom_objects),
                "trust": self._is_trusted,
            }
        )


def _is_hidden(low: float, high: float, limit: float, *, is_floor: bool) -> bool:
    """Whether nobody can tell on which side of a limit it is."""
    return low < limit <= high if is_floor else low <= limit < high
