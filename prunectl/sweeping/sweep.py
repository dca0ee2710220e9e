"""A sweep, from its choices to all its points; what was noted before is not made again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path

from prunectl.analysis import sizes
from prunectl.errors import PrunectlError
from prunectl.formats.registry import open_model
from prunectl.formats.workers import workers
from prunectl.sweeping.bisection import check as check_limit
from prunectl.sweeping.bisection import gain, make_bracket, next_trials
from prunectl.sweeping.grid import check, variants
from prunectl.sweeping.journal import Journal, files_of, find_stale, open_journal
from prunectl.sweeping.trial import BASELINE, SweepConfig, Trial, TrialResult, Variant
from prunectl.sweeping.workers import WorkerPool, encode_job, make_workers, threads_per_worker
from prunectl.sweeping.workers import check as check_place
from prunectl.training.evaluation.max_drop import MaxDrop

Watcher = Callable[[Trial, TrialResult | PrunectlError], None]
"""Told each point when it is made."""


@dataclass(frozen=True, slots=True)
class Swept:
    """What came of a sweep."""

    choices: SweepConfig
    folder: Path
    outcomes: dict[Trial, TrialResult]
    """The model as it is, then way after way, from low to high sparsity."""
    failed: dict[Trial, PrunectlError]
    max_drop: MaxDrop | None = None
    again: tuple[str, ...] = ()
    """What was made again, and why."""

    @property
    def base(self) -> TrialResult:
        """The model as it is."""
        return self.outcomes[BASELINE]

    @property
    def best(self) -> dict[Variant, Trial | None]:
        """The largest sparsity of each way that keeps within the drop; none where every one fell below it."""
        if self.max_drop is None:
            return {}
        holds = {way: make_bracket(way, self.outcomes, self.max_drop.amount).holds for way in variants(self.choices)}
        return {way: way.at(sparsity) if sparsity else None for way, sparsity in holds.items()}


def sweep(
    path: Path,
    choices: SweepConfig,
    folder: Path,
    *,
    jobs: int = 1,
    place: str = "",
    max_drop: MaxDrop | None = None,
    watcher: Watcher = lambda *_: None,
) -> Swept:
    """Make every point that is not made yet, and return all that were asked for; the place is that of its workers."""
    check(choices)
    check_place(place)
    model, job = open_model(path), encode_job(path, choices, folder)
    failed: dict[Trial, PrunectlError] = {}
    with (
        open_journal(
            folder, choices.as_json, sizes.sha256(model), threads_per_worker(jobs), files_of(choices)
        ) as journal,
        closing(WorkerPool(make_workers(place, job, jobs=jobs, threads=journal.threads, lock=journal.fd))) as pool,
    ):
        if BASELINE not in journal.done:
            _run_baseline(pool.attempt(BASELINE), journal)
        if max_drop is not None:
            check_limit(max_drop, journal.done[BASELINE])
        stale = find_stale(folder, journal.done)
        journal.forget(stale)
        next_of_grid = partial(
            next_trials, choices, journal.done, failed, max_drop.amount if max_drop is not None else None
        )

        def next_to_run() -> list[Trial]:
            stale_trials = [point for point in stale if point not in journal.done and point not in failed]
            return stale_trials or next_of_grid()

        for point, result in _run_trials(pool, next_to_run, jobs):
            if isinstance(result, PrunectlError):
                failed[point] = result
            else:
                base = journal.done[BASELINE]
                # Training that went astray has nothing to say of what it is judged by.
                journal.add(point, result if result.metric else replace(result, metric=base.metric, is_up=base.is_up))
            watcher(point, result)
        return Swept(choices, folder, _in_order(choices, journal.done), failed, max_drop, tuple(stale.values()))


def _run_baseline(result: TrialResult | PrunectlError, journal: Journal) -> None:
    """Note the model as it is; without it there is nothing to compare with."""
    if isinstance(result, PrunectlError):
        raise result
    journal.add(BASELINE, result)


def _run_trials(
    pool: WorkerPool, todo: Callable[[], list[Trial]], jobs: int
) -> Iterator[tuple[Trial, TrialResult | PrunectlError]]:
    """Yield points as they are made, until there are no more to make; each must be noted before the next is asked."""
    running: dict[Future[TrialResult | PrunectlError], Trial] = {}
    # Whoever gives up does not wait for hours of training.
    with workers(jobs, on_failure=pool.close) as executor:
        while True:
            for point in todo():
                if point not in running.values():
                    running[executor.submit(pool.attempt, point)] = point
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()


def _in_order(choices: SweepConfig, done: dict[Trial, TrialResult]) -> dict[Trial, TrialResult]:
    """Return the points as a table has them, in whatever order they were made."""
    order = {way: index for index, way in enumerate(variants(choices))}
    points = sorted(
        (point for point in done if point != BASELINE), key=lambda point: (order[point.way], point.sparsity)
    )
    return {point: done[point] for point in (BASELINE, *points)}


def pareto_front(outcomes: Mapping[Trial, TrialResult]) -> list[Trial]:
    """Return the Pareto front of the metric against the gzip size, from small to big."""
    sign = 1.0 if outcomes[BASELINE].is_more_better else -1.0
    finite = {point: outcome for point, outcome in outcomes.items() if outcome.is_number}
    front: list[Trial] = []
    best = float("-inf")
    # Of two that are as good, the smaller; of two alike, the one that comes first.
    for point, outcome in sorted(finite.items(), key=lambda item: (item[1].gzip, -sign * item[1].value)):
        if sign * outcome.value > best:
            best = sign * outcome.value
            front.append(point)
    return front


@dataclass(frozen=True, slots=True)
class ScheduleComparison:
    """Two schedules, and how they compare."""

    one: str
    other: str
    gains: tuple[float, ...]
    """How much better the other is, pair by pair."""

    @property
    def mean(self) -> float:
        """How much better the other is on average."""
        return sum(self.gains) / len(self.gains)


def compare_schedules(choices: SweepConfig, outcomes: Mapping[Trial, TrialResult]) -> list[ScheduleComparison]:
    """Return how every two schedules compare that have points in common."""
    comparisons: list[ScheduleComparison] = []
    for left, right in combinations(choices.schedules if choices.epochs else (), 2):
        counterparts = {point: replace(point, schedule=right) for point in outcomes if point.schedule == left}
        pairs = [
            (outcomes[point], outcomes[counterpart])
            for point, counterpart in counterparts.items()
            if counterpart in outcomes
        ]
        pairs = [pair for pair in pairs if all(left.is_number for left in pair)]
        if pairs:
            comparisons.append(ScheduleComparison(left, right, tuple(gain(*pair) for pair in pairs)))
    return comparisons
