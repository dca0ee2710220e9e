"""Check of models against their budgets; a model that cannot be read does not stop the check of the others."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

from prunectl.analysis.tensor_io import Items, ProgressFactory, no_progress
from prunectl.checks import baseline as baselines
from prunectl.checks.baseline import Baseline, BaselineEntry
from prunectl.checks.lazy_stats import LazyModelStats
from prunectl.checks.parse import (
    EXAMPLES,
    MAX_LATENCY,
    MIN_SPEEDUP,
    Budget,
    Budgets,
    LatencyRule,
    LayerBudget,
    Limit,
    OnMissing,
    expand_globs,
    select_budgets,
)
from prunectl.checks.rules import (
    BaselineContext,
    CheckError,
    Finding,
    Findings,
    check_growth,
    check_model_limit,
    check_pattern,
    check_tensor_limit,
    check_tensor_pattern,
    check_zeros_kept,
    with_context,
)
from prunectl.checks.schema import MetricUnit
from prunectl.errors import PrunectlError, UsageError, attempt
from prunectl.formats.base import select_names
from prunectl.formats.registry import open_model
from prunectl.formats.workers import reuse_worker

BudgetCheck = tuple[int, Callable[[LazyModelStats], Finding | list[Finding]]]
"""The line of a rule in the config, and the function that evaluates it."""


@dataclass
class _CheckRun:
    """State of a check: models measured, findings and errors so far."""

    budgets: Budgets
    baseline: Baseline
    file: str
    is_trusted: bool = False
    earlier: dict[str, BaselineEntry] = field(default_factory=dict)
    """Entries of the baseline before this check recorded new ones."""
    measured: dict[str, LazyModelStats | PrunectlError] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    errors: list[CheckError] = field(default_factory=list)

    @cached_property
    def check_accuracy(self) -> Callable[..., Finding]:
        """The accuracy check, imported only if a budget has max-drop."""
        return self._load_checker("AccuracyChecker")

    @cached_property
    def check_latency(self) -> Callable[..., Finding]:
        """The latency check, imported only if a budget has max-latency or min-speedup."""
        return self._load_checker("LatencyChecker")

    def _load_checker(self, checker: str) -> Callable[..., Finding]:
        running = importlib.import_module("prunectl.checks.running")
        check: Callable[..., Finding] = getattr(running, checker)(
            self.budgets.folder, self.file, is_trusted=self.is_trusted
        ).check
        return check

    def name_of(self, key: str) -> str:
        """The path of a model in the report, relative to the working directory."""
        return os.path.relpath(self.budgets.folder / key)

    def open(self, key: str) -> LazyModelStats | PrunectlError:
        """Open a model, only once if it has several budgets."""
        if key not in self.measured:
            model = attempt(open_model, Path(self.name_of(key)))
            self.measured[key] = model if isinstance(model, PrunectlError) else LazyModelStats(model, self.name_of(key))
        return self.measured[key]


def with_limits(
    budgets: Budgets, names: Sequence[str], max_latency: float | None, min_speedup: float | None
) -> Budgets:
    """The budgets, with the latency limits of the command line in those that are named."""
    chosen = set(select_budgets(budgets, names))
    changed = [
        _with_speedup(_with_latency(budget, max_latency), min_speedup) if budget in chosen else budget
        for budget in budgets.budgets
    ]
    if min_speedup is not None and not any(rule.against for budget in chosen for rule in budget.latency):
        raise UsageError(
            "--min-speedup needs a budget that names the model to compare with",
            hint=f"write {MIN_SPEEDUP} = {EXAMPLES[MIN_SPEEDUP]} in {budgets.path}",
        )
    return replace(budgets, budgets=tuple(changed))


def _with_latency(budget: Budget, seconds: float | None) -> Budget:
    if seconds is None:
        return budget
    rules = [rule for rule in budget.latency if rule.limit.name == MAX_LATENCY]
    limit = Limit(MAX_LATENCY, MetricUnit.SECONDS, rules[0].limit.line if rules else budget.line, seconds)
    own = replace(rules[0], limit=limit) if rules else LatencyRule(limit)
    return replace(budget, latency=(own, *(rule for rule in budget.latency if rule.limit.name != MAX_LATENCY)))


def _with_speedup(budget: Budget, factor: float | None) -> Budget:
    if factor is None:
        return budget
    rules = (
        replace(rule, limit=replace(rule.limit, fail=factor, warn=None)) if rule.against else rule
        for rule in budget.latency
    )
    return replace(budget, latency=tuple(rules))


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
    """The findings of all budgets, or of those named; with a reason, the current sizes become the baseline.

    Only trusted budgets (`is_trusted`) may name user code, such as functions for data, metrics and builders.
    """
    chosen = select_budgets(budgets, names)
    run = _CheckRun(budgets, baseline, file, is_trusted, baseline.entries)
    keys = {budget: _model_keys(run, budget) for budget in chosen}
    with reuse_worker(), meter("checking", Items(sum(map(len, keys.values())))) as bar:
        notes = _record_baseline(run, keys, reason)
        for budget, model_keys in keys.items():
            for key in model_keys:
                _check_model(run, budget, key)
                bar.advance(1)
    measured = sum(isinstance(stats, LazyModelStats) for stats in run.measured.values())
    return Findings(file, tuple(run.findings), tuple(run.errors), tuple(notes), measured, baseline.origin)


def _model_keys(run: _CheckRun, budget: Budget) -> list[str]:
    """The models of a budget; a glob that matches none is an error, which does not stop the other globs."""
    paths, empty = expand_globs(run.budgets.folder, budget)
    for pattern in empty:
        error = UsageError(
            f"{run.file}:{budget.line}: {pattern!r} matches no file",
            hint=f"patterns are relative to {run.budgets.folder}; prunectl init finds the models",
        )
        run.errors.append(CheckError(budget.name, pattern, budget.line, error))
    return paths


def _record_baseline(run: _CheckRun, keys: dict[Budget, list[str]], reason: str) -> list[str]:
    """Record models in the baseline: all of them with a reason, else missing ones with on-missing = "create"."""
    to_record = {key for budget, model_keys in keys.items() if reason or budget.growth for key in model_keys}
    if not reason:
        is_creating = run.budgets.on_missing is OnMissing.CREATE and run.baseline.path is not None
        to_record = to_record - set(run.baseline.entries) if is_creating else set()
    new: dict[str, BaselineEntry] = {}
    for key in sorted(to_record):
        stats = run.open(key)
        # A model that cannot be read is reported when it is checked.
        is_readable = isinstance(stats, LazyModelStats)
        entry = attempt(partial(baselines.snapshot, reason=reason or "created"), stats) if is_readable else stats
        if isinstance(entry, BaselineEntry):
            new[key] = entry
    if not new:
        return []
    path = baselines.write(run.baseline, new)
    run.baseline = Baseline(run.baseline.origin, {**run.baseline.entries, **new}, run.baseline.path)
    return [f"{path} now records {len(new)} {'model' if len(new) == 1 else 'models'}."]


def _check_model(run: _CheckRun, budget: Budget, key: str) -> None:
    stats = run.open(key)
    if isinstance(stats, PrunectlError):
        run.errors.append(CheckError(budget.name, run.name_of(key), budget.line, stats))
        return
    for line, verdict in _budget_checks(run, budget, key):
        outcome = attempt(verdict, stats)
        if isinstance(outcome, PrunectlError):
            run.errors.append(CheckError(budget.name, stats.name, line, outcome))
        else:
            findings = outcome if isinstance(outcome, list) else [outcome]
            run.findings += [with_context(finding, stats, run.earlier.get(key)) for finding in findings]


def _budget_checks(run: _CheckRun, budget: Budget, key: str) -> Iterator[BudgetCheck]:
    for limit in budget.limits:
        yield limit.line, partial(check_model_limit, budget=budget, limit=limit)
    for limit in budget.growth:
        context = BaselineContext(run.baseline, key, run.budgets.on_missing)
        yield limit.line, partial(check_growth, limit=limit, budget=budget, context=context)
    if budget.pattern is not None:
        yield (
            budget.pattern.line,
            partial(check_pattern, pattern=budget.pattern, budget=budget.name, message=budget.message),
        )
    if budget.keep_zeros is not None:
        reference = Path(run.name_of(budget.keep_zeros.value))
        yield (
            budget.keep_zeros.line,
            partial(check_zeros_kept, path=reference, budget=budget, reference=budget.keep_zeros),
        )
    if budget.drop is not None:
        yield budget.drop.limit.line, partial(run.check_accuracy, drop=budget.drop, budget=budget)
    for rule in budget.latency:
        yield rule.limit.line, partial(run.check_latency, rule=rule, budget=budget)
    for layer in budget.layers:
        yield layer.line, partial(_check_layer, budget=budget, layer=layer)


def _check_layer(stats: LazyModelStats, budget: Budget, layer: LayerBudget) -> list[Finding]:
    chosen = {tensor.name for tensor in select_names(stats.model, layer.selector)}
    rows = [row for row in stats.metadata_stats.layers if row.name in chosen]
    weights = [row for row in rows if row.is_prunable] or rows
    findings = [check_tensor_limit(stats, row, limit, budget, layer) for limit in layer.limits for row in weights]
    if (pattern := layer.pattern) is not None:
        message = layer.message or budget.message
        findings += [check_tensor_pattern(stats, row.name, pattern, budget.name, message) for row in weights]
    return findings
