"""Holds models against their budgets: one that cannot be read does not stop the others."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TypeGuard

from prunectl.analysis.tensor_io import ProgressFactory, no_progress
from prunectl.checks import baseline as baselines
from prunectl.checks.baseline import Baseline, BaselineEntry
from prunectl.checks.lazy_stats import LazyModelStats
from prunectl.checks.parse import Budget, Budgets, LayerBudget, OnMissing, expand_globs, select_budgets
from prunectl.checks.rules import (
    BaselineContext,
    CheckError,
    Finding,
    Findings,
    check_pattern,
    check_tensor_pattern,
    check_zeros_kept,
    growth,
    of_model,
    of_tensor,
)
from prunectl.errors import PrunectlError, UsageError, attempt
from prunectl.formats.registry import open_model
from prunectl.formats.sandbox import reuse_worker
from prunectl.formats.selectors import select_names

Verdict = tuple[int, Callable[[LazyModelStats], Finding | list[Finding]]]
"""The line that asks, and what answers."""


@dataclass
class _CheckRun:
    """What is known so far."""

    budgets: Budgets
    baseline: Baseline
    file: str
    is_trusted: bool = False
    measured: dict[str, LazyModelStats | PrunectlError] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    unusable: list[CheckError] = field(default_factory=list)

    @cached_property
    def keeps_quality(self) -> Callable[..., Finding]:
        """What judges models on data, loaded when a budget asks for it: most look at files alone."""
        quality = importlib.import_module("prunectl.checks.accuracy")
        judge = quality.AccuracyChecker(self.budgets.folder, self.file, is_trusted=self.is_trusted)
        keeps: Callable[..., Finding] = judge.check
        return keeps

    def name_of(self, key: str) -> str:
        """Return a model's path as the report calls it."""
        return os.path.relpath(self.budgets.folder / key)

    def open(self, key: str) -> LazyModelStats | PrunectlError:
        """Return a model, opened once however many budgets it has."""
        if key not in self.measured:
            found = attempt(open_model, Path(self.name_of(key)))
            self.measured[key] = found if isinstance(found, PrunectlError) else LazyModelStats(found, self.name_of(key))
        return self.measured[key]


def check(
    budgets: Budgets,
    names: list[str],
    baseline: Baseline,
    *,
    file: str,
    reason: str = "",
    is_trusted: bool = False,
    meter: ProgressFactory = no_progress,
) -> Findings:
    """Return the verdicts of all budgets, or of those named; with a reason, what is now becomes the baseline.

    Only budgets that are trusted may name code of their own: data, metrics and builders that are functions.
    """
    chosen = select_budgets(budgets, names)
    work = _CheckRun(budgets, baseline, file, is_trusted)
    keys = {budget: _keys(work, budget) for budget in chosen}
    with reuse_worker(), meter("checking", sum(map(len, keys.values()))) as bar:
        notes = _recorded(work, keys, reason)
        for budget, found in keys.items():
            for key in found:
                _judge(work, budget, key)
                bar.advance(1)
    measured = sum(isinstance(found, LazyModelStats) for found in work.measured.values())
    return Findings(file, tuple(work.findings), tuple(work.unusable), tuple(notes), measured)


def _keys(work: _CheckRun, budget: Budget) -> list[str]:
    """Return the models of a budget; a glob without any is a slip, which does not stop the others."""
    found, empty = expand_globs(work.budgets.folder, budget)
    for pattern in empty:
        error = UsageError(
            f"{work.file}:{budget.line}: {pattern!r} matches no file", hint=f"looked in {work.budgets.folder}"
        )
        work.unusable.append(CheckError(budget.name, pattern, budget.line, error))
    return found


def _recorded(work: _CheckRun, keys: dict[Budget, list[str]], reason: str) -> list[str]:
    """Take models for their baseline: all of them with a reason, else those that are to be created."""
    wanted = {key for budget, found in keys.items() if reason or budget.growth for key in found}
    if not reason:
        is_creating = work.budgets.on_missing is OnMissing.CREATE and work.baseline.path is not None
        wanted = wanted - set(work.baseline.entries) if is_creating else set()
    new: dict[str, BaselineEntry] = {}
    for key in sorted(wanted):
        found = work.open(key)
        # One that cannot be read is told of when it is judged.
        known = attempt(partial(baselines.snapshot, reason=reason or "created"), found) if _is_open(found) else found
        if isinstance(known, BaselineEntry):
            new[key] = known
    if not new:
        return []
    path = baselines.write(work.baseline, new)
    work.baseline = Baseline(work.baseline.place, {**work.baseline.entries, **new}, work.baseline.path)
    return [f"{path} has {len(new)} {'model' if len(new) == 1 else 'models'} as now."]


def _is_open(found: LazyModelStats | PrunectlError) -> TypeGuard[LazyModelStats]:
    return isinstance(found, LazyModelStats)


def _judge(work: _CheckRun, budget: Budget, key: str) -> None:
    found = work.open(key)
    if isinstance(found, PrunectlError):
        work.unusable.append(CheckError(budget.name, work.name_of(key), budget.line, found))
        return
    for line, verdict in _layer_findings(work, budget, key):
        said = attempt(verdict, found)
        if isinstance(said, PrunectlError):
            work.unusable.append(CheckError(budget.name, found.name, line, said))
        else:
            work.findings += said if isinstance(said, list) else [said]


def _layer_findings(work: _CheckRun, budget: Budget, key: str) -> Iterator[Verdict]:
    for limit in budget.limits:
        yield limit.line, partial(of_model, budget=budget, limit=limit)
    for limit in budget.growth:
        known = BaselineContext(work.baseline, key, work.budgets.on_missing)
        yield limit.line, partial(growth, limit=limit, budget=budget, known=known)
    if budget.pattern is not None:
        yield (
            budget.pattern.line,
            partial(check_pattern, wanted=budget.pattern, budget=budget.name, message=budget.message),
        )
    if budget.keep_zeros is not None:
        other = Path(work.name_of(budget.keep_zeros.value))
        yield budget.keep_zeros.line, partial(check_zeros_kept, path=other, budget=budget, wanted=budget.keep_zeros)
    if budget.drop is not None:
        yield budget.drop.limit.line, partial(work.keeps_quality, drop=budget.drop, budget=budget)
    for layer in budget.layers:
        yield layer.line, partial(_of_layer, budget=budget, layer=layer)


def _of_layer(found: LazyModelStats, budget: Budget, layer: LayerBudget) -> list[Finding]:
    chosen = {tensor.name for tensor in select_names(found.model, layer.selector)}
    rows = [row for row in found.facts.layers if row.name in chosen]
    weights = [row for row in rows if row.is_prunable] or rows
    findings = [of_tensor(found, row, limit, budget, layer) for limit in layer.limits for row in weights]
    if (wanted := layer.pattern) is not None:
        message = layer.message or budget.message
        findings += [check_tensor_pattern(found, row.name, wanted, budget.name, message) for row in weights]
    return findings
