"""What became of every tensor of a model?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prunectl.formats.base import WEIGHTS, ModelFile
from prunectl.gating.lockstep import Seen, differ, lockstep
from prunectl.gating.pairing import Pair, pairing
from prunectl.measuring.codecs import CodecName, pick
from prunectl.measuring.meter import Meter, unwatched
from prunectl.measuring.sizes import measure
from prunectl.measuring.survey import LayerRow, Survey
from prunectl.measuring.zeros import nonzero


@dataclass(frozen=True, slots=True)
class Change:
    """A tensor beside what it was; either may be missing."""

    new: LayerRow | None
    old: LayerRow | None
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
class Difference:
    """Two models, tensor by tensor."""

    new: Survey
    old: Survey
    changes: tuple[Change, ...]

    @property
    def growth(self) -> int:
        """By how many bytes the new one is bigger, compressed."""
        return (self.new.bytes.compressed or 0) - (self.old.bytes.compressed or 0)


def difference(new: ModelFile, old: ModelFile, meter: Meter = unwatched) -> Difference:
    """Return what became of every tensor; two pieces of numbers are in memory at a time where they lie flat."""
    codec = pick(CodecName.GZIP, None)
    now, then = measure(new, codec, meter), measure(old, codec, meter)
    rows, were = ({row.name: row for row in survey.layers} for survey in (now, then))
    found = pairing(new.tensors, old.tensors)
    changes = {}
    with meter("comparing", sum(pair.new.nbytes for pair in found.pairs)) as bar:
        for pair in found.pairs:
            changes[pair.new.name] = _change(new, old, pair, rows[pair.new.name], were[pair.old.name])
            bar.advance(pair.new.nbytes)
    changes |= {tensor.name: Change(rows[tensor.name], None) for tensor in found.added}
    ordered = [changes[tensor.name] for tensor in new.tensors]
    return Difference(now, then, (*ordered, *(Change(None, were[tensor.name]) for tensor in found.gone)))


def _change(new: ModelFile, old: ModelFile, pair: Pair, row: LayerRow, was: LayerRow) -> Change:
    if pair.axes is None and pair.new.shape != pair.old.shape:
        return Change(row, was, str(pair.how))
    changed = gained = lost = 0
    for now, then in lockstep(Seen(new, pair.new), Seen(old, pair.old, pair.axes)):
        kept, had = nonzero(now), nonzero(then)
        changed += int(np.count_nonzero(differ(now, then)))
        gained += int(np.count_nonzero(had & ~kept))
        lost += int(np.count_nonzero(kept & ~had))
    return Change(row, was, str(pair.how), changed, gained, lost)
