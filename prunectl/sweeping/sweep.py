"""Sweep of a grid of trials on a pool of workers, and bisection for a limit; both record trials in a journal."""

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
"""Called with each finished trial, and its result or error."""


@dataclass(frozen=True, slots=True)
class Swept:
    """The result of a sweep."""

    config: SweepConfig
    folder: Path
    outcomes: dict[Trial, TrialResult]
    """Results: first the baseline, then each variant from low to high sparsity."""
    failed: dict[Trial, PrunectlError]
    max_drop: MaxDrop | None = None
    rerun_notes: tuple[str, ...] = ()
    """Notes on trials that ran again, each with the reason."""

    @property
    def base(self) -> TrialResult:
        """The result of the unpruned model."""
        return self.outcomes[BASELINE]

    @property
    def best(self) -> dict[Variant, Trial | None]:
        """The trial of each variant with the largest sparsity within the limit; None if all exceed it."""
        if self.max_drop is None:
            return {}
        passing = {
            variant: make_bracket(variant, self.outcomes, self.max_drop.amount).passing
            for variant in variants(self.config)
        }
        return {variant: variant.trial(sparsity) if sparsity else None for variant, sparsity in passing.items()}


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
    # Untrusted code is refused before a folder is created or a worker started.
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
                # The result of diverged training has no metric: the baseline's is recorded.
                journal.add(trial, result if result.metric else replace(result, metric=base.metric, is_up=base.is_up))
            watcher(trial, result)
        return Swept(config, folder, _in_order(config, journal.done), failed, max_drop, tuple(stale.values()))


def _run_baseline(result: TrialResult | PrunectlError, journal: Journal) -> None:
    """Record the result of the unpruned model; without it, there is nothing to compare with."""
    if isinstance(result, PrunectlError):
        raise result
    journal.add(BASELINE, result)


def _run_trials(
    pool: WorkerPool, todo: Callable[[], list[Trial]], jobs: int
) -> Iterator[tuple[Trial, TrialResult | PrunectlError]]:
    """Yield results as trials finish, until none is left; the caller must record each before it takes the next."""
    running: dict[Future[TrialResult | PrunectlError], Trial] = {}
    # On failure or Ctrl-C, workers are killed: their training may take hours.
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
    # Of two equally good trials, the smaller one is on the front; if sizes are equal as well, the first.
    for trial, outcome in sorted(finite.items(), key=lambda item: (item[1].gzip, -sign * item[1].value)):
        if sign * outcome.value > best:
            best = sign * outcome.value
            front.append(trial)
    return front


@dataclass(frozen=True, slots=True)
class ScheduleComparison:
    """Comparison of two schedules over the trials that both have."""

    left: str
    right: str
    gains: tuple[float, ...]
    """How much better `right` is than `left`, for each pair of trials."""

    @property
    def mean(self) -> float:
        """How much better `right` is than `left` on average."""
        return sum(self.gains) / len(self.gains)


def compare_schedules(config: SweepConfig, outcomes: Mapping[Trial, TrialResult]) -> list[ScheduleComparison]:
    """Compare every two schedules over the trials that both have."""
    comparisons: list[ScheduleComparison] = []
    for left, right in combinations(config.schedules if config.epochs else (), 2):
        counterparts = {trial: replace(trial, schedule=right) for trial in outcomes if trial.schedule == left}
        pairs = [
            (outcomes[trial], outcomes[counterpart])
            for trial, counterpart in counterparts.items()
            if counterpart in outcomes
        ]
        pairs = [pair for pair in pairs if all(result.is_number for result in pair)]
        if pairs:
            comparisons.append(ScheduleComparison(left, right, tuple(gain(*pair) for pair in pairs)))
    return comparisons


@dataclass(frozen=True, slots=True)
class Search:
    """A search for the largest sparsity within a limit."""

    variant: Variant
    limit: MaxDrop
    evaluation: FinetuneRequest
    """Data and metric on which models are evaluated."""
    build: Callable[[Path, float, Destination], None]
    """Writes the model, pruned to a sparsity."""
    choices: dict[str, Any]
    """Options that determine the results, recorded in the journal."""
    files: Mapping[str, str]
    """Hashes of the files that these options name."""


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The result of a search."""

    limit: MaxDrop
    base: TrialResult
    best: Trial
    tried: dict[Trial, TrialResult]
    """Results from low to high sparsity."""
    folder: Path
    rerun_notes: tuple[str, ...] = ()
    """Notes on trials that ran again, each with the reason."""

    @property
    def result(self) -> TrialResult:
        """The result of the best trial."""
        return self.tried[self.best]

    @property
    def path(self) -> Path:
        """The model of the best trial, as long as the folder exists."""
        return self.folder / self.result.path

    def within_limit(self, trial: Trial) -> bool:
        """Whether the drop of a trial is within the limit."""
        return drop(self.tried[trial], self.base) <= self.limit.amount


def search(path: Path, request: Search, folder: Path, watcher: Watcher) -> SearchResult:
    """Bisection for the largest sparsity within the limit, to a hundredth; the folder keeps the model of each trial."""
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
        raise _infeasible_error(tried, base, request.limit)
    return SearchResult(
        request.limit, base, request.variant.trial(bracket.passing), tried, folder, tuple(stale.values())
    )


def _infeasible_error(tried: dict[Trial, TrialResult], base: TrialResult, limit: MaxDrop) -> WorkError:
    trial, result = next(iter(tried.items()))
    worse = f"{amount(drop(result, base), base)} worse" if result.is_number else "NaN"
    return WorkError(
        f"the limit cannot be kept: even at a sparsity of {trial.sparsity:.0%}, {base.metric} is {worse}; "
        f"a drop of {limit.shown} is allowed; nothing was written",
        hint="raise --max-drop, or try another strategy or scope" if result.path else result.notes[0],
    )
