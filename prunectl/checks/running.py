"""Checks that run models: accuracy on data, and latency as in `bench`. Imported only if a budget has such a limit."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Hashable, Iterable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from prunectl.checks.lazy_stats import LazyModelStats
from prunectl.checks.parse import Budget, LatencyRule, MaxDropRule
from prunectl.checks.rules import Finding, evaluate_limit
from prunectl.checks.schema import MetricUnit
from prunectl.errors import PrunectlError, WorkError, attempt
from prunectl.exporting.bench import Benchmark, BenchRequest, bench
from prunectl.exporting.bench import parse_request as parse_bench_request
from prunectl.plugins import check_untrusted
from prunectl.pruning import RANDOM_PREFIX
from prunectl.training.backend import LoadOptions, TrainOptions
from prunectl.training.evaluate import Evaluation, evaluate_baseline
from prunectl.training.max_drop import MaxDrop, check_max_drop, improvement
from prunectl.training.request import FinetuneRequest, parse_metrics
from prunectl.units import duration

Subject = TypeVar("Subject", bound=Hashable)
Result = TypeVar("Result")


class RunningChecker:
    """Base of checks that run models: results are cached, and paths are relative to the config."""

    def __init__(self, folder: Path, file: str, *, is_trusted: bool = False) -> None:
        self._folder = folder
        """The folder that paths in budgets are relative to."""
        self._file = file
        self._is_trusted = is_trusted
        """Whether user code may run that the budgets name, or that comes with a model."""
        self._results: dict[Hashable, Any] = {}

    @contextmanager
    def _naming_line(self, line: int) -> Generator[None]:
        """Put the file and line of the config in front of errors."""
        try:
            yield
        except PrunectlError as error:
            raise type(error)(
                f"{self._file}:{line}: {error.message}", hint=error.hint, did_you_mean=error.did_you_mean
            ) from error

    def _once(self, key: Subject, run: Callable[[Subject], Result]) -> Result:
        """The cached result of a run; a cached error is raised again."""
        if key not in self._results:
            self._results[key] = attempt(run, key)
        result: Result | PrunectlError = self._results[key]
        if isinstance(result, PrunectlError):
            raise result
        return result

    def _check_code(self, data: str, others: Iterable[str], key: str) -> None:
        """Refuse user code that a key of the config names, unless it is trusted; random data is not code."""
        if not self._is_trusted:
            check_untrusted(("" if data.startswith(RANDOM_PREFIX) else data, *others), key)

    def _resolve(self, spec: str) -> str:
        """A spec whose path is relative to the config, made relative to the working directory."""
        path = spec.partition("?")[0]
        file = path.rpartition(":")[0] or path
        is_path = bool(file) and (self._folder / file).exists()
        return os.path.join(os.path.relpath(self._folder), spec) if is_path else spec


class AccuracyChecker(RunningChecker):
    """Evaluates max-drop; each model is evaluated once on the same data."""

    def check(self, stats: LazyModelStats, *, drop: MaxDropRule, budget: Budget) -> Finding:
        """Evaluate max-drop; an error names its line in the config."""
        with self._naming_line(drop.limit.line):
            return self._check(stats, drop=drop, budget=budget)

    def _check(self, stats: LazyModelStats, *, drop: MaxDropRule, budget: Budget) -> Finding:
        request = self._request(drop)
        against = os.path.relpath(self._folder / drop.against)
        before, after = self._evaluate(against, request), self._evaluate(stats.name, request)
        limit = drop.limit
        for bound in (limit.fail, limit.warn):
            if bound is not None:
                check_max_drop(
                    MaxDrop(bound, limit.metric is MetricUnit.POINTS),
                    before.metric,
                    before.value,
                    higher_is_better=before.higher_is_better,
                )
        drop_now = -improvement(before.value, after.value, higher_is_better=before.higher_is_better) or 0.0
        note = (
            f"{before.metric} is {before.value:.4g} for {drop.against}, {after.value:.4g} for this model ({drop.data})."
        )
        return evaluate_limit(
            stats.name, before.metric, drop_now, limit, budget=budget.name, message=budget.message, note=note
        )

    def _evaluate(self, path: str, request: FinetuneRequest) -> Evaluation:
        return self._once((path, request), lambda key: evaluate_baseline(Path(key[0]), key[1]))

    def _request(self, drop: MaxDropRule) -> FinetuneRequest:
        means = TrainOptions(**parse_metrics((drop.metric,)))
        data = self._resolve(drop.data)
        self._check_code(data, (*means.metrics, means.decides, drop.model, drop.custom_objects), "max-drop")
        origin = LoadOptions(self._resolve(drop.model), self._resolve(drop.custom_objects), is_trusted=self._is_trusted)
        return replace(FinetuneRequest(data), batch_size=drop.batch_size, means=means, origin=origin)


class LatencyChecker(RunningChecker):
    """Evaluates max-latency and min-speedup; each model is measured once with the same options."""

    def check(self, stats: LazyModelStats, *, rule: LatencyRule, budget: Budget) -> Finding:
        """Evaluate max-latency or min-speedup; an error names its line in the config."""
        with self._naming_line(rule.limit.line):
            return self._check(stats, rule, budget)

    def _check(self, stats: LazyModelStats, rule: LatencyRule, budget: Budget) -> Finding:
        limit, is_speedup = rule.limit, rule.limit.metric is MetricUnit.FACTOR
        against = (os.path.relpath(self._folder / rule.against),) if rule.against else ()
        benchmark = self._measure((*against, stats.name), self._request(rule))
        ((size, latencies),) = benchmark.latencies.items()
        interval = latencies[-1].speedup if is_speedup else latencies[-1].median
        low, high = (f"{value:.2f}" if is_speedup else duration(value) for value in (interval.low, interval.high))
        if limit.fail is not None and _is_undecided(interval.low, interval.high, limit.fail, is_floor=is_speedup):
            measured = f"it is {low} to {high} times as fast" if is_speedup else f"a run takes {low} to {high}"
            bound = f"{limit.fail:g}" if is_speedup else duration(limit.fail)
            raise WorkError(
                f"{stats.name} cannot be judged: {measured}, too near {limit.name} = {bound}",
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
        return parse_bench_request(
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


def _is_undecided(low: float, high: float, limit: float, *, is_floor: bool) -> bool:
    """Whether the limit lies inside the interval, so that the value may be on either side of it."""
    return low < limit <= high if is_floor else low <= limit < high
