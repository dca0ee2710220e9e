"""What became of every tensor of a model?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from prunectl.analysis.sizes import CodecName, get_codec, measure
from prunectl.analysis.stats import ModelStats, TensorStats
from prunectl.analysis.tensor_io import ProgressFactory, no_progress, nonzero_mask
from prunectl.checks.matching import Pair, TensorView, bitwise_differs, iter_paired_chunks, pairing
from prunectl.checks.parse import Limit, Words
from prunectl.checks.rules import Finding, evaluate_limit
from prunectl.checks.schema import MetricUnit
from prunectl.errors import UsageError
from prunectl.formats.base import WEIGHTS, ModelFile
from prunectl.formats.selectors import close_matches


@dataclass(frozen=True, slots=True)
class TensorDiff:
    """A tensor beside what it was; either may be missing."""

    new: TensorStats | None
    old: TensorStats | None
    how: str = ""
    """Why the two are taken for the same."""
    changed: int | None = None
    """Elements that are not what they were; unknown where the shape is another."""
    gained: int | None = None
    """Zeros that were none."""
    lost: int | None = None
    """Zeros that are none any more."""

    @property
    def name(self) -> str:
        """The name it has, or had."""
        row = self.new or self.old
        assert row is not None
        return row.name

    @property
    def kind(self) -> str:
        """What became of it, in a word."""
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
        """Whether its zeros are those of pruning."""
        return any(row is not None and row.is_prunable for row in (self.new, self.old))

    @property
    def is_needed(self) -> bool:
        """Whether a model needs it to predict, as it does not need the state of an optimizer."""
        return any(row is not None and row.role in WEIGHTS for row in (self.new, self.old))


@dataclass(frozen=True, slots=True)
class ModelDiff:
    """Two models, tensor by tensor."""

    new: ModelStats
    old: ModelStats
    changes: tuple[TensorDiff, ...]

    @property
    def growth(self) -> int:
        """By how many bytes the new one is bigger, compressed."""
        return (self.new.bytes.compressed or 0) - (self.old.bytes.compressed or 0)


def difference(new: ModelFile, old: ModelFile, meter: ProgressFactory = no_progress) -> ModelDiff:
    """Return what became of every tensor; two pieces of numbers are in memory at a time where they lie flat."""
    codec = get_codec(CodecName.GZIP, None)
    now, then = measure(new, codec, meter), measure(old, codec, meter)
    rows, were = ({row.name: row for row in survey.layers} for survey in (now, then))
    found = pairing(new.tensors, old.tensors)
    changes = {}
    with meter("comparing", sum(pair.new.nbytes for pair in found.pairs)) as bar:
        for pair in found.pairs:
            changes[pair.new.name] = _change(new, old, pair, rows[pair.new.name], were[pair.old.name])
            bar.advance(pair.new.nbytes)
    changes |= {tensor.name: TensorDiff(rows[tensor.name], None) for tensor in found.added}
    ordered = [changes[tensor.name] for tensor in new.tensors]
    return ModelDiff(now, then, (*ordered, *(TensorDiff(None, were[tensor.name]) for tensor in found.gone)))


def _change(new: ModelFile, old: ModelFile, pair: Pair, row: TensorStats, was: TensorStats) -> TensorDiff:
    if pair.axes is None and pair.new.shape != pair.old.shape:
        return TensorDiff(row, was, str(pair.how))
    changed = gained = lost = 0
    for now, then in iter_paired_chunks(TensorView(new, pair.new), TensorView(old, pair.old, pair.axes)):
        kept, had = nonzero_mask(now), nonzero_mask(then)
        changed += int(np.count_nonzero(bitwise_differs(now, then)))
        gained += int(np.count_nonzero(had & ~kept))
        lost += int(np.count_nonzero(kept & ~had))
    return TensorDiff(row, was, str(pair.how), changed, gained, lost)


class DiffRule(StrEnum):
    """What may be forbidden."""

    GROWTH = "growth"
    NONZERO = "nonzero"
    SHAPE = "shape"
    DTYPE = "dtype"
    CHANGED = "changed"


_COUNTS: dict[DiffRule, tuple[str, Callable[[TensorDiff], int]]] = {
    DiffRule.NONZERO: ("zeros_lost", lambda change: (change.lost or 0) if change.is_prunable else 0),
    DiffRule.SHAPE: ("tensors", lambda change: int(change.is_needed and change.kind in {"added", "gone", "resized"})),
    DiffRule.DTYPE: ("tensors", lambda change: int(change.kind == "retyped")),
    DiffRule.CHANGED: ("elements_changed", lambda change: change.changed or 0),
}


@dataclass(frozen=True, slots=True)
class FailOn:
    """One thing that is forbidden."""

    slip: DiffRule
    limit: Limit


def parse(text: str, words: Words) -> tuple[FailOn, ...]:
    """Return what a list with commas forbids."""
    return tuple(_parsed(word.strip(), words) for word in text.split(",")) if text else ()


def judge(found: ModelDiff, forbidden: tuple[FailOn, ...]) -> tuple[Finding, ...]:
    """Return a verdict for everything that is forbidden."""
    return tuple(_growth(found, one) if one.slip is DiffRule.GROWTH else _counted(found, one) for one in forbidden)


def _parsed(word: str, words: Words) -> FailOn:
    name, sign, bound = word.partition(":")
    if name not in list(DiffRule):
        raise UsageError(
            f"{name!r} cannot be forbidden",
            did_you_mean=close_matches(name, list(DiffRule)),
            hint=f"known: {', '.join(DiffRule)}",
        )
    slip = DiffRule(name)
    if slip is not DiffRule.GROWTH:
        if sign:
            raise UsageError(f"{name} takes no limit", hint=f"write {name}")
        return FailOn(slip, Limit(name, MetricUnit.COUNT, 1, fail=0))
    if not bound:
        raise UsageError("how much growth?", hint="write growth:2% or growth:10KB")
    if bound.endswith("%"):
        return FailOn(slip, Limit(name, MetricUnit.RATIO, 1, fail=words.ratio(bound)))
    return FailOn(slip, Limit(name, MetricUnit.BYTES, 1, fail=words.size(bound)))


def _growth(found: ModelDiff, one: FailOn) -> Finding:
    actual: float = found.growth
    if one.limit.metric is MetricUnit.RATIO:
        # Compressed, no file is empty.
        actual = found.growth / (found.old.bytes.compressed or 1)
    return evaluate_limit(found.new.path, "bytes.compressed", actual, one.limit)


def _counted(found: ModelDiff, one: FailOn) -> Finding:
    metric, count = _COUNTS[one.slip]
    counts = [(count(change), change.name) for change in found.changes]
    first = next((name for number, name in counts if number), "")
    note = f"{first} is the first." if first else ""
    return evaluate_limit(found.new.path, metric, sum(number for number, _ in counts), one.limit, note=note)
