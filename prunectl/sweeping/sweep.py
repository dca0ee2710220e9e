"""Trials noted in a journal: a sweep of a grid on a pool of workers, and a bisection for what holds a limit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from prunectl.analysis import sizes
from prunectl.errors import PrunectlError, WorkError
from prunectl.formats.registry import open_model
from prunectl.formats.workers import workers
from prunectl.pruning.destination import Destination
from prunectl.sweeping.grid import amount, check, check_limit, drop, gain, make_bracket, next_trials, variants
from prunectl.sweeping.journal import Journal, digest, files_of, find_stale, open_journal
from prunectl.sweeping.requests import training_of
from prunectl.sweeping.trial import BASELINE, SweepConfig, Trial, TrialResult, Variant
from prunectl.sweeping.workers import WorkerPool, encode_job, make_trial, make_workers, threads_per_worker
from prunectl.sweeping.workers import check as check_on
from prunectl.training import user_code
from prunectl.training.max_drop import MaxDrop
from prunectl.training.request import FinetuneRequest

Watcher = Callable[[Trial, TrialResult | PrunectlError], None]
"""Told each trial when it is made."""


@dataclass(frozen=True, slots=True)
class Swept:
    """The result of a sweep."""

    config: SweepConfig
    folder: Path
    outcomes: dict[Trial, TrialResult]
    """The model as it is, then way after way, from low to high sparsity."""
    failed: dict[Trial, PrunectlError]
    max_drop: MaxDrop | None = None
    rebuilt: tuple[str, ...] = ()
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
        holds = {
            variant: make_bracket(variant, self.outcomes, self.max_drop.amount).passing
            for variant in variants(self.config)
        }
        return {variant: variant.trial(sparsity) if sparsity else None for variant, sparsity in holds.items()}


def sweep(
    path: Path,
    config: SweepConfig,
    folder: Path,
    *,
    jobs: int = 1,
    on: str = "",
    max_drop: MaxDrop | None = None,
    watcher: Watcher = lambda *_: None,
) -> Swept:
    """Run every trial that is not in the journal; `on` is empty, `ray` or `ray:ADDRESS`."""
    check(config)
    check_on(on)
    model, job = open_model(path), encode_job(path, config, folder)
    # Before there is a folder, or a worker to refuse it.
    user_code.check(model, training_of(config, BASELINE).origin)
    failed: dict[Trial, PrunectlError] = {}
    with (
        open_journal(
            folder, config.as_json, sizes.sha256(model), threads_per_worker(jobs), files_of(config)
        ) as journal,
        closing(WorkerPool(make_workers(on, job, jobs=jobs, threads=journal.threads, lock=journal.fd))) as pool,
    ):
        if BASELINE not in journal.done:
            _run_baseline(pool.attempt(BASELINE), journal)
        if max_drop is not None:
            check_limit(max_drop, journal.done[BASELINE])
        stale = find_stale(folder, journal.done)
        journal.discard(stale)
        next_of_grid = partial(
            next_trials, config, journal.done, failed, max_drop.amount if max_drop is not None else None
        )

        def next_to_run() -> list[Trial]:
            stale_trials = [trial for trial in stale if trial not in journal.done and trial not in failed]
            return stale_trials or next_of_grid()

        for trial, result in _run_trials(pool, next_to_run, jobs):
            if isinstance(result, PrunectlError):
                failed[trial] = result
            else:
                base = journal.done[BASELINE]
                # Training that went astray has nothing to say of what it is judged by.
                journal.add(trial, result if result.metric else replace(result, metric=base.metric, is_up=base.is_up))
            watcher(trial, result)
        return Swept(config, folder, _in_order(config, journal.done), failed, max_drop, tuple(stale.values()))


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
            for trial in todo():
                if trial not in running.values():
                    running[executor.submit(pool.attempt, trial)] = trial
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()


def _in_order(config: SweepConfig, done: dict[Trial, TrialResult]) -> dict[Trial, TrialResult]:
    order = {variant: index for index, variant in enumerate(variants(config))}
    trials = sorted(
        (trial for trial in done if trial != BASELINE), key=lambda trial: (order[trial.variant], trial.sparsity)
    )
    return {trial: done[trial] for trial in (BASELINE, *trials)}


def pareto_front(outcomes: Mapping[Trial, TrialResult]) -> list[Trial]:
    """Pareto front of the metric against the gzip size, from small to large."""
    sign = 1.0 if outcomes[BASELINE].higher_is_better else -1.0
    finite = {trial: outcome for trial, outcome in outcomes.items() if outcome.is_number}
    front: list[Trial] = []
    best = float("-inf")
    # Of two that are as good, the smaller; of two alike, the one that comes first.
    for trial, outcome in sorted(finite.items(), key=lambda item: (item[1].gzip, -sign * item[1].value)):
        if sign * outcome.value > best:
            best = sign * outcome.value
            front.append(trial)
    return front


@dataclass(frozen=True, slots=True)
class ScheduleComparison:
    """Two schedules, and how they compare."""

    left: str
    right: str
    gains: tuple[float, ...]
    """How much better the other is, pair by pair."""

    @property
    def mean(self) -> float:
        """How much better the other is on average."""
        return sum(self.gains) / len(self.gains)


def compare_schedules(config: SweepConfig, outcomes: Mapping[Trial, TrialResult]) -> list[ScheduleComparison]:
    """Compare every two schedules over the trials that they share."""
    comparisons: list[ScheduleComparison] = []
    for left, right in combinations(config.schedules if config.epochs else (), 2):
        counterparts = {trial: replace(trial, schedule=right) for trial in outcomes if trial.schedule == left}
        pairs = [
            (outcomes[trial], outcomes[counterpart])
            for trial, counterpart in counterparts.items()
            if counterpart in outcomes
        ]
        pairs = [pair for pair in pairs if all(left.is_number for left in pair)]
        if pairs:
            comparisons.append(ScheduleComparison(left, right, tuple(gain(*pair) for pair in pairs)))
    return comparisons


@dataclass(frozen=True, slots=True)
class Search:
    """A search for the largest sparsity within a limit."""

    variant: Variant
    limit: MaxDrop
    evaluation: FinetuneRequest
    """By which data and which metric."""
    build: Callable[[Path, float, Destination], None]
    """Writes a model at a sparsity."""
    choices: dict[str, Any]
    """What decides the numbers, noted with what was tried."""
    files: Mapping[str, str]
    """The hashes of the files that these words name."""


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The result of a search."""

    limit: MaxDrop
    base: TrialResult
    best: Trial
    tried: dict[Trial, TrialResult]
    """From low to high sparsity."""
    folder: Path
    rebuilt: tuple[str, ...] = ()
    """What was made again, and why."""

    @property
    def result(self) -> TrialResult:
        """What the largest sparsity that holds came to."""
        return self.tried[self.best]

    @property
    def path(self) -> Path:
        """The model at that sparsity, as long as the folder is there."""
        return self.folder / self.result.path

    def within_limit(self, trial: Trial) -> bool:
        """Whether a sparsity is within the limit."""
        return drop(self.tried[trial], self.base) <= self.limit.amount


def search(path: Path, request: Search, folder: Path, watcher: Watcher) -> SearchResult:
    """The largest sparsity that holds, to a hundredth; each that is tried is kept in a folder."""
    with open_journal(folder, request.choices, digest(path), threads_per_worker(1), request.files) as journal:

        def run(trial: Trial) -> None:
            result = make_trial(
                path, folder, trial, request.evaluation, lambda output: request.build(path, trial.sparsity, output)
            )
            journal.add(trial, result)
            if trial != BASELINE:
                watcher(trial, result)

        if BASELINE not in journal.done:
            run(BASELINE)
        base = journal.done[BASELINE]
        check_limit(request.limit, base)
        stale = find_stale(folder, journal.done)
        journal.discard(stale)
        for trial in stale:
            run(trial)
        while not (bracket := make_bracket(request.variant, journal.done, request.limit.amount)).is_closed:
            run(request.variant.trial(bracket.middle))
        tried = {
            trial: journal.done[trial]
            for trial in sorted(journal.done.keys() - {BASELINE}, key=lambda trial: trial.sparsity)
        }
    if not bracket.passing:
        raise _infeasible(tried, base, request.limit)
    return SearchResult(
        request.limit, base, request.variant.trial(bracket.passing), tried, folder, tuple(stale.values())
    )


def _infeasible(tried: dict[Trial, TrialResult], base: TrialResult, limit: MaxDrop) -> WorkError:
    trial, result = next(iter(tried.items()))
    worse = f"{amount(drop(result, base), base)} worse" if result.is_number else "NaN"
    return WorkError(
        f"the limit cannot be kept: even at a sparsity of {trial.sparsity:.0%}, {base.metric} is {worse}; "
        f"a drop of {limit.shown} is allowed; nothing was written",
        hint="raise --max-drop, or try another strategy or scope" if result.path else result.notes[0],
    )
