"""Is a number within its limit?"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from prunectl.analysis.sizes import LimitCheck
from prunectl.analysis.stats import TensorStats
from prunectl.analysis.tensor_io import count_zeros, nonzero_mask
from prunectl.checks.baseline import Baseline
from prunectl.checks.lazy_stats import LazyModelStats
from prunectl.checks.matching import TensorView, iter_paired_chunks
from prunectl.checks.parse import Budget, LayerBudget, Limit, OnMissing, Wanted
from prunectl.checks.schema import MetricUnit
from prunectl.errors import InputError, PrunectlError
from prunectl.formats.registry import open_model

ERROR, WARNING = "error", "warning"


@dataclass(frozen=True, slots=True)
class Finding(LimitCheck):
    """A limit, what was found, and where in the file of budgets it stands."""

    unit: MetricUnit = MetricUnit.COUNT
    budget: str = ""
    tensor: str = ""
    line: int = 1
    note: str = ""
    """What is behind the number, a full sentence."""
    message: str = ""
    """What who wrote the budget has to say."""

    @property
    def is_failure(self) -> bool:
        """Whether it says no."""
        return not self.ok and self.level == ERROR

    @property
    def is_warning(self) -> bool:
        """Whether it only warns."""
        return not self.ok and self.level != ERROR

    @property
    def verdict(self) -> str:
        """The outcome in a word."""
        return "pass" if self.ok else "FAIL" if self.is_failure else "warn"


@dataclass(frozen=True, slots=True)
class CheckError:
    """A model, or a limit on it, that nothing can be said about."""

    budget: str
    path: str
    line: int
    error: PrunectlError


@dataclass(frozen=True, slots=True)
class Findings:
    """All that was found: what every report is made of."""

    file: str
    """The file of budgets, as a reader of the report finds it."""
    findings: tuple[Finding, ...]
    unusable: tuple[CheckError, ...] = ()
    notes: tuple[str, ...] = ()
    models: int = 0
    """How many were measured."""

    @property
    def failed(self) -> tuple[Finding, ...]:
        """What said no."""
        return tuple(finding for finding in self.findings if finding.is_failure)

    @property
    def warned(self) -> tuple[Finding, ...]:
        """What only warns."""
        return tuple(finding for finding in self.findings if finding.is_warning)

    @property
    def exit_code(self) -> int:
        """The worst of what happened."""
        return max([0, *([1] if self.failed else []), *(one.error.exit_code for one in self.unusable)])


_EPSILON = 1e-12
"""2.3 % is not quite 23 / 1000 in floating point; a byte of a terabyte makes more of a difference."""

_OF_MODEL: dict[str, tuple[str, Callable[[LazyModelStats], float]]] = {
    "max-raw": ("bytes.raw", lambda found: found.raw),
    "max-gzip": ("bytes.compressed", lambda found: found.gzip),
    "max-packed": ("bytes.packed", lambda found: found.packed),
    "max-params": ("params.total", lambda found: found.facts.params.total),
    "max-flops": ("flops", lambda found: 2 * (found.operations.macs or 0)),
    "min-sparsity": ("prunable_sparsity", lambda found: found.zeros.prunable_sparsity or 0.0),
}
_OF_TENSOR: dict[str, tuple[str, Callable[[LazyModelStats, TensorStats], float]]] = {
    "max-params": ("params", lambda _, row: row.params),
    "max-flops": ("flops", lambda found, row: 2 * _macs(found, row)),
    "min-sparsity": ("sparsity", lambda found, row: found.zeros_of[row.name].sparsity or 0.0),
    "max-sparsity": ("sparsity", lambda found, row: found.zeros_of[row.name].sparsity or 0.0),
}


def of_model(found: LazyModelStats, budget: Budget, limit: Limit) -> Finding:
    """Return what a limit says of a model."""
    metric, measure = _OF_MODEL[limit.name]
    finding = evaluate_limit(found.name, metric, measure(found), limit, budget=budget.name, message=budget.message)
    if limit.name == "max-flops" and finding.ok and (unknown := found.operations.macs_unknown):
        # What is known of it is within the limit; the whole may not be.
        raise InputError(f"{found.name} has {len(unknown)} operations of unknown shape, such as {unknown[0]}")
    return finding


def of_tensor(found: LazyModelStats, row: TensorStats, limit: Limit, budget: Budget, layer: LayerBudget) -> Finding:
    """Return what a limit says of a tensor."""
    metric, measure = _OF_TENSOR[limit.name]
    message = layer.message or budget.message
    actual = measure(found, row)
    return evaluate_limit(found.name, metric, actual, limit, budget=budget.name, tensor=row.name, message=message)


def evaluate_limit(
    model: str,
    metric: str,
    actual: float,
    limit: Limit,
    *,
    budget: str = "",
    tensor: str = "",
    message: str = "",
    note: str = "",
) -> Finding:
    """Return the verdict: of the limit that was broken, the one that says no first."""
    broken_by = (
        level
        for level, bound in ((ERROR, limit.fail), (WARNING, limit.warn))
        if bound is not None and not is_within(limit.name, actual, bound)
    )
    broken = next(broken_by, None)
    level = broken or (ERROR if limit.fail is not None else WARNING)
    bound = limit.fail if level == ERROR else limit.warn
    assert bound is not None
    return Finding(
        limit.name, metric, bound, actual, broken is None, model, level,
        unit=limit.metric, budget=budget, tensor=tensor, line=limit.line, note=note, message=message,
    )  # fmt: skip


def is_within(name: str, actual: float, bound: float) -> bool:
    """Whether a number keeps a limit; equal to it, it does."""
    hair = _EPSILON if isinstance(bound, float) else 0
    return actual >= bound - hair if name.startswith("min-") else actual <= bound + hair


def sum_or_none(found: LazyModelStats, name: str, metric: str, line: int, share: float, **more: str) -> Finding:
    """Return the verdict on what holds for everything, or does not."""
    limit = Limit(name, MetricUnit.RATIO, line, fail=1.0)
    return evaluate_limit(found.name, metric, share, limit, **more)


def _macs(found: LazyModelStats, row: TensorStats) -> int:
    macs = found.operations_of[row.name].macs
    if macs is None:
        raise InputError(f"{found.name} does not say in which shape {row.name} is used")
    return macs


GROWTH_METRIC = "bytes.compressed"


@dataclass(frozen=True, slots=True)
class BaselineContext:
    """What is known of a model's past."""

    baseline: Baseline
    key: str
    on_missing: OnMissing


def growth(found: LazyModelStats, limit: Limit, budget: Budget, known: BaselineContext) -> Finding:
    """Return the verdict on the growth of the compressed size."""
    entry = known.baseline.entries.get(known.key)
    if entry is None:
        return _unknown(found, limit, budget, known)
    grown = found.gzip - entry.gzip
    if limit.metric is MetricUnit.RATIO and entry.gzip == 0:
        # No share of nothing says how much: every byte is too many.
        limit = replace(limit, metric=MetricUnit.BYTES, fail=_nothing(limit.fail), warn=_nothing(limit.warn))
    actual: float = grown / entry.gzip if limit.metric is MetricUnit.RATIO else grown
    note = f"It was {entry.gzip} bytes compressed, and is {found.gzip}."
    return evaluate_limit(
        found.name, GROWTH_METRIC, actual, limit, budget=budget.name, message=budget.message, note=note
    )


def _nothing(bound: float | None) -> float | None:
    return None if bound is None else 0


def _unknown(found: LazyModelStats, limit: Limit, budget: Budget, known: BaselineContext) -> Finding:
    """Return the verdict on a model that the baseline does not know: all of it is growth."""
    nothing = Limit(limit.name, MetricUnit.BYTES, limit.line, fail=0)
    note = f"{known.baseline.place} does not know it, so that all of it is growth."
    if known.on_missing is OnMissing.CREATE:
        note += " A baseline in git is not written to." if known.baseline.path is None else ""
    finding = evaluate_limit(
        found.name, GROWTH_METRIC, found.gzip, nothing, budget=budget.name, message=budget.message, note=note
    )
    return replace(finding, level=ERROR if known.on_missing is OnMissing.FAIL else WARNING)


PATTERN_METRIC = "conforming"


def check_pattern(found: LazyModelStats, wanted: Wanted, budget: str, message: str) -> Finding:
    """Return the verdict on all prunable tensors of a model whose inputs divide into groups."""
    share, worst = _worst(row for row in found.patterned(wanted.value).values() if row.is_prunable)
    return _finding(found, wanted, share, worst, budget=budget, message=message)


def check_tensor_pattern(found: LazyModelStats, name: str, wanted: Wanted, budget: str, message: str) -> Finding:
    """Return the verdict on one tensor."""
    share, worst = _worst([found.patterned(wanted.value)[name]])
    return _finding(found, wanted, share, worst, budget=budget, message=message, tensor=name)


def _worst(rows: Iterable[TensorStats]) -> tuple[float, str]:
    known = [(row.conforming, row.name) for row in rows if row.conforming is not None]
    return min(known, default=(0.0, ""))


def _finding(found: LazyModelStats, wanted: Wanted, share: float, worst: str, **more: str) -> Finding:
    if not worst:
        note = f"No inputs divide into the groups of {wanted.value}."
    else:
        note = "" if share == 1 else f"{worst} is the furthest from {wanted.value}."
    return sum_or_none(found, "min-nm", PATTERN_METRIC, wanted.line, share, note=note, **more)


def check_zeros_kept(found: LazyModelStats, path: Path, budget: Budget, wanted: Wanted) -> Finding:
    """Return the verdict on the zeros of another model, in its prunable weights."""
    other = open_model(path)
    lost, first = 0, ""
    mine = {tensor.name: tensor for tensor in found.model.tensors}
    for tensor in other.tensors:
        if not tensor.is_prunable:
            continue
        here = mine.get(tensor.name)
        if here is not None and here.shape == tensor.shape:
            gone = sum(
                int(np.count_nonzero(nonzero_mask(now) & ~nonzero_mask(then)))
                for now, then in iter_paired_chunks(TensorView(found.model, here), TensorView(other, tensor))
            )
            reason = f"{tensor.name} has {gone} weights that were zero"
        else:
            # Nothing can be said of its zeros, so that none of them counts as kept.
            gone = count_zeros(other, tensor)
            reason = f"{tensor.name} is not there" if here is None else f"{tensor.name} has another shape"
        if gone:
            lost, first = lost + gone, first or f"{reason}, in {wanted.value}."
    limit = Limit("keep-zeros", MetricUnit.COUNT, wanted.line, fail=0)
    return evaluate_limit(found.name, "zeros_lost", lost, limit, budget=budget.name, message=budget.message, note=first)
