"""The search for the largest sparsity within a --max-drop, by bisection over journalled trials."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunectl.errors import WorkError
from prunectl.pruning.destination import Destination
from prunectl.sweeping.grid import amount, check_limit, drop, make_bracket
from prunectl.sweeping.journal import digest, find_stale, open_journal
from prunectl.sweeping.trial import BASELINE, Trial, TrialResult, Variant
from prunectl.sweeping.workers import evaluate, make_trial, threads_per_worker
from prunectl.training.max_drop import MaxDrop
from prunectl.training.request import FinetuneRequest

Watcher = Callable[[Trial, TrialResult], None]
"""Told each sparsity when it was tried."""


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
        if BASELINE not in journal.done:
            journal.add(BASELINE, evaluate(path, request.evaluation, ""))
        base = journal.done[BASELINE]
        check_limit(request.limit, base)
        stale = find_stale(folder, journal.done)
        journal.discard(stale)
        for trial in stale:
            journal.add(trial, _run_trial(path, request, folder, trial))
            watcher(trial, journal.done[trial])
        while not (bracket := make_bracket(request.variant, journal.done, request.limit.amount)).is_closed:
            trial = request.variant.trial(bracket.middle)
            journal.add(trial, _run_trial(path, request, folder, trial))
            watcher(trial, journal.done[trial])
        tried = {
            trial: journal.done[trial]
            for trial in sorted(journal.done.keys() - {BASELINE}, key=lambda trial: trial.sparsity)
        }
    if not bracket.passing:
        raise _infeasible(tried, base, request.limit)
    return SearchResult(
        request.limit, base, request.variant.trial(bracket.passing), tried, folder, tuple(stale.values())
    )


def _run_trial(path: Path, request: Search, folder: Path, trial: Trial) -> TrialResult:
    return make_trial(
        path, folder, trial, request.evaluation, lambda output: request.build(path, trial.sparsity, output)
    )


def _infeasible(tried: dict[Trial, TrialResult], base: TrialResult, limit: MaxDrop) -> WorkError:
    trial, result = next(iter(tried.items()))
    worse = f"{amount(drop(result, base), base)} worse" if result.is_number else "NaN"
    return WorkError(
        f"the limit cannot be kept: even at a sparsity of {trial.sparsity:.0%}, {base.metric} is {worse}; "
        f"a drop of {limit.shown} is allowed; nothing was written",
        hint="raise --max-drop, or try another strategy or scope" if result.path else result.notes[0],
    )
