"""What of a difference is one too many: `growth:2%,nonzero,shape`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from prunectl.errors import UsageError
from prunectl.formats.names import nearest
from prunectl.gating.budget import Limit
from prunectl.gating.difference import Change, Difference
from prunectl.gating.finding import Finding
from prunectl.gating.keys import Metric
from prunectl.gating.limits import judged
from prunectl.gating.read import Words


class Slip(StrEnum):
    """What may be forbidden."""

    GROWTH = "growth"
    NONZERO = "nonzero"
    SHAPE = "shape"
    DTYPE = "dtype"
    CHANGED = "changed"


_COUNTS: dict[Slip, tuple[str, Callable[[Change], int]]] = {
    Slip.NONZERO: ("zeros_lost", lambda change: (change.lost or 0) if change.is_prunable else 0),
    Slip.SHAPE: ("tensors", lambda change: int(change.is_needed and change.kind in {"added", "gone", "resized"})),
    Slip.DTYPE: ("tensors", lambda change: int(change.kind == "retyped")),
    Slip.CHANGED: ("elements_changed", lambda change: change.changed or 0),
}


@dataclass(frozen=True, slots=True)
class FailOn:
    """One thing that is forbidden."""

    slip: Slip
    limit: Limit


def parse(text: str, words: Words) -> tuple[FailOn, ...]:
    """Return what a list with commas forbids."""
    return tuple(_parsed(word.strip(), words) for word in text.split(",")) if text else ()


def judge(found: Difference, forbidden: tuple[FailOn, ...]) -> tuple[Finding, ...]:
    """Return a verdict for everything that is forbidden."""
    return tuple(_growth(found, one) if one.slip is Slip.GROWTH else _counted(found, one) for one in forbidden)


def _parsed(word: str, words: Words) -> FailOn:
    name, sign, bound = word.partition(":")
    if name not in list(Slip):
        raise UsageError(
            f"{name!r} cannot be forbidden", did_you_mean=nearest(name, list(Slip)), hint=f"known: {', '.join(Slip)}"
        )
    slip = Slip(name)
    if slip is not Slip.GROWTH:
        if sign:
            raise UsageError(f"{name} takes no limit", hint=f"write {name}")
        return FailOn(slip, Limit(name, Metric.COUNT, 1, fail=0))
    if not bound:
        raise UsageError("how much growth?", hint="write growth:2% or growth:10KB")
    if bound.endswith("%"):
        return FailOn(slip, Limit(name, Metric.RATIO, 1, fail=words.ratio(bound)))
    return FailOn(slip, Limit(name, Metric.BYTES, 1, fail=words.size(bound)))


def _growth(found: Difference, one: FailOn) -> Finding:
    actual: float = found.growth
    if one.limit.metric is Metric.RATIO:
        # Compressed, no file is empty.
        actual = found.growth / (found.old.bytes.compressed or 1)
    return judged(found.new.path, "bytes.compressed", actual, one.limit)


def _counted(found: Difference, one: FailOn) -> Finding:
    metric, count = _COUNTS[one.slip]
    counts = [(count(change), change.name) for change in found.changes]
    first = next((name for number, name in counts if number), "")
    note = f"{first} is the first." if first else ""
    return judged(found.new.path, metric, sum(number for number, _ in counts), one.limit, note=note)
