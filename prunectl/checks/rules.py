"""Rules of a check: sizes, sparsity, growth, patterns and kept zeros against their limits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from prunectl.analysis.sizes import SENTENCES_ONLY, LimitCheck, growth_sentence
from prunectl.analysis.stats import TensorStats
from prunectl.analysis.tensor_io import count_zeros
from prunectl.checks.baseline import Baseline, BaselineEntry
from prunectl.checks.lazy_stats import LazyModelStats
from prunectl.checks.matching import TensorView, count_changes
from prunectl.checks.parse import Budget, LayerBudget, Limit, LocatedValue, OnMissing
from prunectl.checks.schema import MetricUnit
from prunectl.errors import InputError, PrunectlError
from prunectl.formats.registry import open_model
from prunectl.units import Units, nbytes

ERROR, WARNING = "error", "warning"


@dataclass(frozen=True, slots=True)
class Finding(LimitCheck):
    """The result of a limit, with its line in the config."""

    unit: MetricUnit = MetricUnit.COUNT
    budget: str = ""
    tensor: str = ""
    line: int = 1
    note: str = ""
    """Explanation of the number, a full sentence."""
    message: str = ""
    """The message of the budget's author, printed if the limit is exceeded."""
    before: int | None = field(default=None, kw_only=True, metadata=SENTENCES_ONLY)
    """The value in the baseline: parameters for `max-params`, else bytes."""
    largest: tuple[tuple[str, int], ...] = field(default=(), kw_only=True, metadata=SENTENCES_ONLY)
    """The largest tensors of a model that is too large, with their bytes."""
    grown: str = field(default="", kw_only=True, metadata=SENTENCES_ONLY)
    """Which tensors grew most since the baseline, a full sentence; empty if this is unknown."""
    is_measured: bool = field(default=True, kw_only=True, metadata=SENTENCES_ONLY)
    """Whether the value could be compared with a baseline."""

    @property
    def is_failure(self) -> bool:
        """Whether it fails the check."""
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
    """A model or a limit that could not be evaluated."""

    budget: str
    path: str
    line: int
    error: PrunectlError


@dataclass(frozen=True, slots=True)
class Findings:
    """All results of a check."""

    file: str
    """Path of the budgets file in the report."""
    findings: tuple[Finding, ...]
    errors: tuple[CheckError, ...] = ()
    notes: tuple[str, ...] = ()
    models: int = 0
    """Number of models that were measured."""
    baseline: str = "the baseline"
    """Name of the baseline in the report."""
    accept_command: str = 'prunectl check --update-baseline --reason "…"'
    """The command that makes the current sizes the baseline."""
    command_line: str = ""
    """The command line of this check."""

    @property
    def failed(self) -> tuple[Finding, ...]:
        """Findings that failed."""
        return tuple(finding for finding in self.findings if finding.is_failure)

    @property
    def warned(self) -> tuple[Finding, ...]:
        """Findings that warn."""
        return tuple(finding for finding in self.findings if finding.is_warning)

    @property
    def exit_code(self) -> int:
        """The highest exit code of all failures and errors."""
        return max([0, *([1] if self.failed else []), *(failure.error.exit_code for failure in self.errors)])


_EPSILON = 1e-12
"""Tolerance for floating-point bounds (2.3 % is not exactly 23 / 1000); it is no more than a byte of a terabyte."""

_MODEL_METRICS: dict[str, tuple[str, Callable[[LazyModelStats], float]]] = {
    "max-raw": ("bytes.raw", lambda stats: stats.raw),
    "max-gzip": ("bytes.compressed", lambda stats: stats.gzip),
    "max-packed": ("bytes.packed", lambda stats: stats.packed),
    "max-params": ("params.total", lambda stats: stats.metadata_stats.params.total),
    "max-flops": ("flops", lambda stats: 2 * (stats.operations.macs or 0)),
    "min-sparsity": ("prunable_sparsity", lambda stats: stats.zeros.prunable_sparsity or 0.0),
}
_TENSOR_METRICS: dict[str, tuple[str, Callable[[LazyModelStats, TensorStats], float]]] = {
    "max-params": ("params", lambda _, row: row.params),
    "max-flops": ("flops", lambda stats, row: 2 * _macs(stats, row)),
    "min-sparsity": ("sparsity", lambda stats, row: stats.zeros_of[row.name].sparsity or 0.0),
    "max-sparsity": ("sparsity", lambda stats, row: stats.zeros_of[row.name].sparsity or 0.0),
}


def check_model_limit(stats: LazyModelStats, budget: Budget, limit: Limit) -> Finding:
    """Evaluate a limit on a model."""
    metric, measure = _MODEL_METRICS[limit.name]
    reaches = stats.zeros.reaches if limit.name == "min-sparsity" else None
    finding = evaluate_limit(
        stats.name, metric, measure(stats), limit, reaches=reaches, budget=budget.name, message=budget.message
    )
    if limit.name == "max-flops" and finding.ok and (unknown := stats.operations.macs_unknown):
        # The known operations are within the limit, but all of them together may not be.
        raise InputError(
            f"{stats.name} has {len(unknown)} operations of unknown shape that cannot be counted, such as {unknown[0]}"
        )
    return finding


def check_tensor_limit(
    stats: LazyModelStats, row: TensorStats, limit: Limit, budget: Budget, layer: LayerBudget
) -> Finding:
    """Evaluate a limit on a tensor."""
    metric, measure = _TENSOR_METRICS[limit.name]
    message = layer.message or budget.message
    actual = measure(stats, row)
    reaches = stats.zeros_of[row.name].reaches if limit.name == "min-sparsity" else None
    return evaluate_limit(
        stats.name, metric, actual, limit, reaches=reaches, budget=budget.name, tensor=row.name, message=message
    )


def evaluate_limit(
    model: str,
    metric: str,
    actual: float,
    limit: Limit,
    *,
    reaches: Callable[[float], bool] | None = None,
    budget: str = "",
    tensor: str = "",
    message: str = "",
    note: str = "",
) -> Finding:
    """Evaluate a number against a limit; failing takes precedence over warning.

    `reaches` replaces the comparison with a bound for metrics that have rounding rules, such as sparsity.
    """
    broken_by = (
        level
        for level, bound in ((ERROR, limit.fail), (WARNING, limit.warn))
        if bound is not None and not (reaches(bound) if reaches is not None else is_within(limit.name, actual, bound))
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
    """Whether a number is within a limit, or equal to it."""
    tolerance = _EPSILON if isinstance(bound, float) else 0
    return actual >= bound - tolerance if name.startswith("min-") else actual <= bound + tolerance


def _macs(stats: LazyModelStats, row: TensorStats) -> int:
    macs = stats.operations_of[row.name].macs
    if macs is None:
        raise InputError(
            f"the shape of the inputs of {row.name} in {stats.name} is unknown, so its operations cannot be counted"
        )
    return macs


GROWTH_METRIC = "bytes.compressed"


@dataclass(frozen=True, slots=True)
class BaselineContext:
    """The baseline, and the key of a model in it."""

    baseline: Baseline
    key: str
    on_missing: OnMissing


def check_growth(stats: LazyModelStats, limit: Limit, budget: Budget, context: BaselineContext) -> Finding:
    """Evaluate the growth of the compressed size over the baseline."""
    entry = context.baseline.entries.get(context.key)
    if entry is None:
        return _finding_without_baseline(stats, limit, budget, context)
    growth = stats.gzip - entry.gzip
    if limit.metric is MetricUnit.RATIO and entry.gzip == 0:
        # Growth from 0 has no ratio: any byte is over the limit.
        limit = replace(limit, metric=MetricUnit.BYTES, fail=_zero_bound(limit.fail), warn=_zero_bound(limit.warn))
    actual: float = growth / entry.gzip if limit.metric is MetricUnit.RATIO else growth
    before, now = nbytes(entry.gzip), nbytes(stats.gzip)
    if before == now and growth:
        before, now = (nbytes(value, Units.BYTES) + " B" for value in (entry.gzip, stats.gzip))
    note = f"It was {before} gzipped in the baseline, and is {now}."
    return evaluate_limit(
        stats.name, GROWTH_METRIC, actual, limit, budget=budget.name, message=budget.message, note=note
    )


def _zero_bound(bound: float | None) -> float | None:
    return None if bound is None else 0


def _finding_without_baseline(stats: LazyModelStats, limit: Limit, budget: Budget, context: BaselineContext) -> Finding:
    """The finding for a model that is not in the baseline; in JSON, its whole size is growth over a limit of 0."""
    zero_limit = Limit(limit.name, MetricUnit.BYTES, limit.line, fail=0)
    note = f"{stats.name} is not in {context.baseline.origin}, so its growth was not checked."
    if context.on_missing is OnMissing.CREATE:
        note += " A baseline in git cannot be updated." if context.baseline.path is None else ""
    finding = evaluate_limit(
        stats.name, GROWTH_METRIC, stats.gzip, zero_limit, budget=budget.name, message=budget.message, note=note
    )
    return replace(finding, level=ERROR if context.on_missing is OnMissing.FAIL else WARNING, is_measured=False)


_BEFORE: dict[str, Callable[[BaselineEntry], int]] = {
    "max-raw": lambda entry: entry.raw,
    "max-gzip": lambda entry: entry.gzip,
    "max-growth": lambda entry: entry.gzip,
    "max-params": lambda entry: entry.params,
}
_OF_SIZE = ("max-raw", "max-packed", "max-gzip", "max-growth", "max-params")
_LARGEST = 3


def with_context(finding: Finding, stats: LazyModelStats, entry: BaselineEntry | None) -> Finding:
    """The finding with context: the value in the baseline, the largest tensors, and those that grew most."""
    if finding.tensor:
        return finding
    before = _BEFORE[finding.id](entry) if entry is not None and finding.id in _BEFORE else None
    if finding.ok or not finding.is_measured or finding.id not in _OF_SIZE:
        return replace(finding, before=before)
    rows = sorted((row for row in stats.metadata_stats.layers if not row.tied_to), key=lambda row: -row.bytes)
    grown = ""
    if entry is not None and entry.tensors and before is not None:
        # A tensor that the baseline does not list was smaller than those that it lists, or did not exist.
        least = min(size for size, _ in entry.tensors.values())
        grown = growth_sentence(stats.zeros, entry.tensors, Units.SI, least)
    largest = tuple((row.name, row.bytes) for row in rows[:_LARGEST])
    return replace(finding, before=before, largest=largest, grown=grown)


PATTERN_METRIC = "conforming"


def check_pattern(stats: LazyModelStats, pattern: LocatedValue, budget: str, message: str) -> Finding:
    """Evaluate a pattern on all prunable tensors whose inputs divide into groups."""
    share, worst = _least_conforming(row for row in stats.conforming(pattern.value).values() if row.is_prunable)
    return _pattern_finding(stats, pattern, share, worst, budget=budget, message=message)


def check_tensor_pattern(stats: LazyModelStats, name: str, pattern: LocatedValue, budget: str, message: str) -> Finding:
    """Evaluate a pattern on one tensor."""
    share, worst = _least_conforming([stats.conforming(pattern.value)[name]])
    return _pattern_finding(stats, pattern, share, worst, budget=budget, message=message, tensor=name)


def _least_conforming(rows: Iterable[TensorStats]) -> tuple[float, str]:
    shares = [(row.conforming, row.name) for row in rows if row.conforming is not None]
    return min(shares, default=(0.0, ""))


def _pattern_finding(
    stats: LazyModelStats,
    pattern: LocatedValue,
    share: float,
    worst: str,
    *,
    budget: str,
    message: str,
    tensor: str = "",
) -> Finding:
    if not worst:
        note = f"No tensor has inputs that divide into the groups of {pattern.value}."
    else:
        note = "" if share == 1 else f"{worst} follows {pattern.value} least."
    limit = Limit("min-nm", MetricUnit.RATIO, pattern.line, fail=1.0)
    return evaluate_limit(
        stats.name, PATTERN_METRIC, share, limit, note=note, budget=budget, message=message, tensor=tensor
    )


def check_zeros_kept(stats: LazyModelStats, path: Path, budget: Budget, reference: LocatedValue) -> Finding:
    """Evaluate keep-zeros: zeros of a reference model's prunable weights that were lost."""
    source = open_model(path)
    total, first = 0, ""
    tensors_now = {tensor.name: tensor for tensor in stats.model.tensors}
    for tensor in source.tensors:
        if not tensor.is_prunable:
            continue
        tensor_now = tensors_now.get(tensor.name)
        if tensor_now is not None and tensor_now.shape == tensor.shape:
            views = TensorView(stats.model, tensor_now), TensorView(source, tensor)
            zeros_lost = count_changes(*views).zeros_lost
            reason = f"{zeros_lost} weights of {tensor.name} are no longer zero"
        else:
            # Its zeros cannot be compared, so all of them count as lost.
            zeros_lost = count_zeros(source, tensor)
            reason = f"{tensor.name} is missing" if tensor_now is None else f"{tensor.name} has a different shape"
        if zeros_lost:
            total, first = total + zeros_lost, first or f"{reason}, compared with {reference.value}."
    limit = Limit("keep-zeros", MetricUnit.COUNT, reference.line, fail=0)
    return evaluate_limit(
        stats.name, "zeros_lost", total, limit, budget=budget.name, message=budget.message, note=first
    )
