"""Is a model still as good on data as the one that it was made of?"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from prunectl.errors import PrunectlError, attempt
from prunectl.gating.budget import Budget, Drop
from prunectl.gating.finding import Finding
from prunectl.gating.keys import Metric
from prunectl.gating.limits import judged
from prunectl.gating.measured import Measured
from prunectl.plugins import check_untrusted
from prunectl.training.asked import asked
from prunectl.training.data import made_up
from prunectl.training.judging.drop import MaxDrop, check, gain
from prunectl.training.judging.judge import Judged, judge_whole
from prunectl.training.network import Means, Origin
from prunectl.training.request import Request


class Quality:
    """How good models are, each judged once on the same data."""

    def __init__(self, folder: Path, file: str, *, is_trusted: bool = False) -> None:
        self._folder = folder
        """Where paths in budgets begin."""
        self._file = file
        self._is_trusted = is_trusted
        """Whether code may run that the budgets name, or that comes with a model."""
        self._known: dict[tuple[str, Request], Judged | PrunectlError] = {}

    def keeps(self, found: Measured, *, drop: Drop, budget: Budget) -> Finding:
        """Return the verdict on how much worse a model is than the other one; what stops it is told with its line."""
        try:
            return self._kept(found, drop=drop, budget=budget)
        except PrunectlError as error:
            place = f"{self._file}:{drop.limit.line}"
            raise type(error)(f"{place}: {error.message}", hint=error.hint, did_you_mean=error.did_you_mean) from error

    def _kept(self, found: Measured, *, drop: Drop, budget: Budget) -> Finding:
        request = self._request(drop)
        against = os.path.relpath(self._folder / drop.against)
        before, after = self._judged(against, request), self._judged(found.name, request)
        limit = drop.limit
        for bound in (limit.fail, limit.warn):
            if bound is not None:
                check(MaxDrop(bound, limit.metric is Metric.POINTS), before.metric, before.value, is_up=before.is_up)
        lost = -gain(before.value, after.value, is_up=before.is_up) or 0.0
        note = f"{before.metric} is {before.value:.4g} for {drop.against}, and {after.value:.4g} here, on {drop.data}."
        return judged(found.name, before.metric, lost, limit, budget=budget.name, message=budget.message, note=note)

    def _judged(self, path: str, request: Request) -> Judged:
        key = path, request
        if key not in self._known:
            self._known[key] = attempt(lambda place: judge_whole(place, request), Path(path))
        known = self._known[key]
        if isinstance(known, PrunectlError):
            raise known
        return known

    def _request(self, drop: Drop) -> Request:
        means = Means(**asked((drop.metric,)))
        data = self._place(drop.data)
        if not self._is_trusted:
            named = "" if made_up.fits(data) else data
            check_untrusted((named, *means.metrics, means.decides, drop.model, drop.custom_objects), "max-drop")
        origin = Origin(self._place(drop.model), self._place(drop.custom_objects), is_trusted=self._is_trusted)
        return replace(Request(data), batch_size=drop.batch_size, means=means, origin=origin)

    def _place(self, word: str) -> str:
        """Return a word that begins with the path of something as it is found from where we are."""
        path = word.partition("?")[0]
        file = path.rpartition(":")[0] or path
        is_path = bool(file) and (self._folder / file).exists()
        return os.path.join(os.path.relpath(self._folder), word) if is_path else word
