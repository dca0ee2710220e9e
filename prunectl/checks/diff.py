"""Diff of two models, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from prunectl.analysis.sizes import CodecName, get_codec, measure
from prunectl.analysis.stats import ModelStats, TensorStats
from prunectl.analysis.tensor_io import ProgressFactory, no_progress
from prunectl.checks.matching import Pair, TensorView, count_changes, match_tensors
from prunectl.checks.parse import Limit
from prunectl.checks.rules import Finding, evaluate_limit
from prunectl.checks.schema import MetricUnit
from prunectl.errors import UsageError
from prunectl.formats.base import WEIGHTS, ModelFile, close_matches
from prunectl.units import parse_ratio, parse_size


@dataclass(frozen=True, slots=True)
class TensorDiff:
    """A tensor of the new and the old model; one of the two may be missing."""

    new: TensorStats | None
    old: TensorStats | None
    match_kind: str = ""
    """How the two were matched."""
    changed: int | None = None
    """Number of elements that differ; None if they cannot be compared, as with another shape."""
    zeros_added: int | None = None
    """Number of zeros that were not zero in the old model."""
    zeros_lost: int | None = None
    """Number of zeros of the old model that are no longer zero."""

    @property
    def name(self) -> str:
        """The name in the new model, or else in the old one."""
        row = self.new or self.old
        assert row is not None
        return row.name

    @property
    def kind(self) -> str:
        """The kind of change: gone, added, resized, retyped, changed or same."""
        if self.new is None:
            return "gone"
        if self.old is None:
            return "added"
        if self.changed is None:
            return "resized"
        if self.new.dtype != self.old.dtype:
            return "retyped"
        return "changed" if self.changed else "same"

    @property
    def is_prunable(self) -> bool:
        """Whether the tensor is prunable in one of the models."""
        return any(row is not None and row.is_prunable for row in (self.new, self.old))

    @property
    def is_needed(self) -> bool:
        """Whether inference needs the tensor, unlike the state of an optimizer."""
        return any(row is not None and row.role in WEIGHTS for row in (self.new, self.old))


@dataclass(frozen=True, slots=True)
class ModelDiff:
    """Two models, tensor by tensor."""

    new: ModelStats
    old: ModelStats
    changes: tuple[TensorDiff, ...]

    @property
    def growth(self) -> int:
        """Growth of the compressed size in bytes; negative if the new model is smaller."""
        return (self.new.bytes.compressed or 0) - (self.old.bytes.compressed or 0)


def diff_models(new: ModelFile, old: ModelFile, meter: ProgressFactory = no_progress) -> ModelDiff:
    """Diff every tensor; contiguous tensors are read chunk by chunk."""
    codec = get_codec(CodecName.GZIP, None)
    new_stats, old_stats = measure(new, codec, meter), measure(old, codec, meter)
    new_rows, old_rows = ({row.name: row for row in stats.layers} for stats in (new_stats, old_stats))
    matched = match_tensors(new.tensors, old.tensors)
    changes = {}
    with meter("comparing", sum(pair.new.nbytes for pair in matched.pairs)) as bar:
        for pair in matched.pairs:
            changes[pair.new.name] = _tensor_diff(new, old, pair, new_rows[pair.new.name], old_rows[pair.old.name])
            bar.advance(pair.new.nbytes)
    changes |= {tensor.name: TensorDiff(new_rows[tensor.name], None) for tensor in matched.added}
    removed = (TensorDiff(None, old_rows[tensor.name]) for tensor in matched.removed)
    return ModelDiff(new_stats, old_stats, (*(changes[tensor.name] for tensor in new.tensors), *removed))


def _tensor_diff(new: ModelFile, old: ModelFile, pair: Pair, row: TensorStats, old_row: TensorStats) -> TensorDiff:
    kind = str(pair.match_kind)
    if pair.axes is None and pair.new.shape != pair.old.shape:
        return TensorDiff(row, old_row, kind)
    counts = count_changes(TensorView(new, pair.new), TensorView(old, pair.old, pair.axes))
    return TensorDiff(row, old_row, kind, counts.changed, counts.zeros_added, counts.zeros_lost)


class DiffRule(StrEnum):
    """A rule of --fail-on."""

    GROWTH = "growth"
    NONZERO = "nonzero"
    SHAPE = "shape"
    DTYPE = "dtype"
    CHANGED = "changed"


_RULE_METRICS: dict[DiffRule, tuple[str, Callable[[TensorDiff], int]]] = {
    DiffRule.NONZERO: ("zeros_lost", lambda change: (change.zeros_lost or 0) if change.is_prunable else 0),
    DiffRule.SHAPE: ("tensors", lambda change: int(change.is_needed and change.kind in {"added", "gone", "resized"})),
    DiffRule.DTYPE: ("tensors", lambda change: int(change.kind == "retyped")),
    DiffRule.CHANGED: ("elements_changed", lambda change: change.changed or 0),
}


@dataclass(frozen=True, slots=True)
class FailOn:
    """A rule of --fail-on with its limit."""

    rule: DiffRule
    limit: Limit


def parse(text: str) -> tuple[FailOn, ...]:
    """Parse the comma-separated rules of --fail-on."""
    return tuple(_parse_rule(item.strip()) for item in text.split(",")) if text else ()


def judge(diff: ModelDiff, forbidden: tuple[FailOn, ...]) -> tuple[Finding, ...]:
    """A finding for each rule."""
    return tuple(
        _growth_finding(diff, rule) if rule.rule is DiffRule.GROWTH else _count_finding(diff, rule)
        for rule in forbidden
    )


def _parse_rule(text: str) -> FailOn:
    name, sign, bound = text.partition(":")
    if name not in list(DiffRule):
        raise UsageError(
            f"--fail-on {name!r} is not known",
            did_you_mean=close_matches(name, list(DiffRule)),
            hint=f"rules: {', '.join(DiffRule)}",
        )
    rule = DiffRule(name)
    if rule is not DiffRule.GROWTH:
        if sign:
            raise UsageError(f"--fail-on {name} takes no limit", hint=f"write {name}")
        return FailOn(rule, Limit(name, MetricUnit.COUNT, 1, fail=0))
    if not bound:
        raise UsageError("--fail-on growth needs a limit", hint="write growth:2% or growth:10KB")
    if bound.endswith("%"):
        return FailOn(rule, Limit(name, MetricUnit.RATIO, 1, fail=parse_ratio(bound)))
    return FailOn(rule, Limit(name, MetricUnit.BYTES, 1, fail=parse_size(bound)))


def _growth_finding(diff: ModelDiff, rule: FailOn) -> Finding:
    actual: float = diff.growth
    if rule.limit.metric is MetricUnit.RATIO:
        # The compressed size of a file is never 0.
        actual = diff.growth / (diff.old.bytes.compressed or 1)
    return evaluate_limit(diff.new.path, "bytes.compressed", actual, rule.limit)


def _count_finding(diff: ModelDiff, rule: FailOn) -> Finding:
    metric, count = _RULE_METRICS[rule.rule]
    counts = [(count(change), change.name) for change in diff.changes]
    first = next((name for number, name in counts if number), "")
    note = f"First: {first}." if first else ""
    return evaluate_limit(diff.new.path, metric, sum(number for number, _ in counts), rule.limit, note=note)
