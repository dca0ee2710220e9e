"""Accuracy as a budget: models judged on data, each once. Loaded only where a budget asks for it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from prunectl.checks.lazy_stats import LazyModelStats
from prunectl.checks.parse import Budget, MaxDropRule
from prunectl.checks.rules import Finding, evaluate_limit
from prunectl.checks.schema import MetricUnit
from prunectl.errors import PrunectlError, attempt
from prunectl.plugins import check_untrusted
from prunectl.training.backend import LoadOptions, TrainOptions
from prunectl.training.data.spec import RANDOM_PREFIX
from prunectl.training.evaluate import Evaluation, evaluate_baseline
from prunectl.training.max_drop import MaxDrop, check_max_drop, improvement
from prunectl.training.request import FinetuneRequest, parse_metrics


class AccuracyChecker:
    """How good models are, each judged once on the same data."""

    def __init__(self, folder: Path, file: str, *, is_trusted: bool = False) -> None:
        self._folder = folder
        """Where paths in budgets begin."""
        self._file = file
        self._is_trusted = is_trusted
        """Whether code may run that the budgets name, or that comes with a model."""
        self._evaluations: dict[tuple[str, FinetuneRequest], Evaluation | PrunectlError] = {}

    def check(self, stats: LazyModelStats, *, drop: MaxDropRule, budget: Budget) -> Finding:
        """Evaluate max-drop; an error names its line in the config."""
        try:
            return self._check(stats, drop=drop, budget=budget)
        except PrunectlError as error:
            location = f"{self._file}:{drop.limit.line}"
            raise type(error)(
                f"{location}: {error.message}", hint=error.hint, did_you_mean=error.did_you_mean
            ) from error

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
        key = path, request
        if key not in self._evaluations:
            self._evaluations[key] = attempt(lambda model_path: evaluate_baseline(model_path, request), Path(path))
        evaluation = self._evaluations[key]
        if isinstance(evaluation, PrunectlError):
            raise evaluation
        return evaluation

    def _request(self, drop: MaxDropRule) -> FinetuneRequest:
        means = TrainOptions(**parse_metrics((drop.metric,)))
        data = resolve_spec(self._folder, drop.data)
        if not self._is_trusted:
            named = "" if data.startswith(RANDOM_PREFIX) else data
            check_untrusted((named, *means.metrics, means.decides, drop.model, drop.custom_objects), "max-drop")
        origin = LoadOptions(
            resolve_spec(self._folder, drop.model),
            resolve_spec(self._folder, drop.custom_objects),
            is_trusted=self._is_trusted,
        )
        return replace(FinetuneRequest(data), batch_size=drop.batch_size, means=means, origin=origin)


def resolve_spec(folder: Path, spec: str) -> str:
    """A spec whose path is relative to the folder of a config, made relative to the working directory."""
    path = spec.partition("?")[0]
    file = path.rpartition(":")[0] or path
    is_path = bool(file) and (folder / file).exists()
    return os.path.join(os.path.relpath(folder), spec) if is_path else spec
