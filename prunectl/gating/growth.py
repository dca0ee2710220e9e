"""Has a model grown beyond what its baseline allows?"""

from __future__ import annotations

from dataclasses import dataclass, replace

from prunectl.gating.baseline import Baseline
from prunectl.gating.budget import Budget, Limit, OnMissing
from prunectl.gating.finding import ERROR, WARNING, Finding
from prunectl.gating.keys import Metric
from prunectl.gating.limits import judged
from prunectl.gating.measured import Measured

METRIC = "bytes.compressed"


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a model's past."""

    baseline: Baseline
    key: str
    on_missing: OnMissing


def growth(found: Measured, limit: Limit, budget: Budget, known: Known) -> Finding:
    """Return the verdict on the growth of the compressed size."""
    entry = known.baseline.entries.get(known.key)
    if entry is None:
        return _unknown(found, limit, budget, known)
    grown = found.gzip - entry.gzip
    if limit.metric is Metric.RATIO and entry.gzip == 0:
        # No share of nothing says how much: every byte is too many.
        limit = replace(limit, metric=Metric.BYTES, fail=_nothing(limit.fail), warn=_nothing(limit.warn))
    actual: float = grown / entry.gzip if limit.metric is Metric.RATIO else grown
    note = f"It was {entry.gzip} bytes compressed, and is {found.gzip}."
    return judged(found.name, METRIC, actual, limit, budget=budget.name, message=budget.message, note=note)


def _nothing(bound: float | None) -> float | None:
    return None if bound is None else 0


def _unknown(found: Measured, limit: Limit, budget: Budget, known: Known) -> Finding:
    """Return the verdict on a model that the baseline does not know: all of it is growth."""
    nothing = Limit(limit.name, Metric.BYTES, limit.line, fail=0)
    note = f"{known.baseline.place} does not know it, so that all of it is growth."
    if known.on_missing is OnMissing.CREATE:
        note += " A baseline in git is not written to." if known.baseline.path is None else ""
    finding = judged(found.name, METRIC, found.gzip, nothing, budget=budget.name, message=budget.message, note=note)
    return replace(finding, level=ERROR if known.on_missing is OnMissing.FAIL else WARNING)
