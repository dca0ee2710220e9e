"""Which channels go? Those with the lowest scores, as many as were asked for and as may."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from prunectl.channels.couple import Family
from prunectl.channels.cutting import Cutting
from prunectl.channels.labels import LabelArray
from prunectl.channels.scores import Scores
from prunectl.pruning.plan import Scope


@dataclass(frozen=True, slots=True)
class Candidate:
    """A family that may lose channels, and their scores."""

    family: Family
    scores: Scores
    ratio: float | None = None
    """The share that is asked for, if it is another than that of the others."""


@dataclass(frozen=True, slots=True)
class Loss:
    """The channels of a family that go."""

    family: Family
    dropped: tuple[int, ...]
    """Numbers of its groups."""

    @property
    def labels(self) -> tuple[int, ...]:
        """Labels of what goes."""
        return tuple(self.family.groups[number].label for number in self.dropped)


def choose(candidates: Sequence[Candidate], cutting: Cutting) -> tuple[Loss, ...]:
    """Return what each family loses."""
    counts = _together(candidates, cutting) if cutting.scope is Scope.GLOBAL else _apart(candidates, cutting)
    return tuple(
        Loss(candidate.family, tuple(sorted(map(int, lowest(candidate.scores)[:count]))))
        for candidate, count in zip(candidates, counts, strict=True)
    )


def removed(losses: Sequence[Loss]) -> Mapping[tuple[str, int], LabelArray]:
    """Return the indices that go, by weight and axis."""
    found: dict[tuple[str, int], list[int]] = {}
    for loss in losses:
        for number in loss.dropped:
            for member in loss.family.groups[number].members:
                found.setdefault((member.place.tensor, member.place.axis), []).extend(member.indices)
    return {place: np.unique(indices) for place, indices in found.items()}


def droppable(count: int, asked: int, cutting: Cutting) -> int:
    """Return how many of so many channels go if so many are asked for: what stays is rounded up."""
    kept = max(count - asked, count - math.floor(cutting.max_ratio * count), min(cutting.min_channels, count))
    return count - min(count, math.ceil(kept / cutting.round_to) * cutting.round_to)


def lowest(scores: Scores) -> LabelArray:
    """Return the order in which channels go; of equals the first."""
    return np.argsort(scores, kind="stable")


def _apart(candidates: Sequence[Candidate], cutting: Cutting) -> list[int]:
    return [droppable(len(candidate.scores), _asked(candidate, cutting), cutting) for candidate in candidates]


def _asked(candidate: Candidate, cutting: Cutting) -> int:
    if candidate.ratio is None and cutting.threshold is not None:
        return int((candidate.scores <= 1 - cutting.threshold).sum())
    return round((cutting.ratio if candidate.ratio is None else candidate.ratio) * len(candidate.scores))


def _together(candidates: Sequence[Candidate], cutting: Cutting) -> list[int]:
    """Rank all channels by their score over the mean of their family, and stop at what a family may lose."""
    ranked = sorted(
        (float(score) / (float(candidate.scores.mean()) or 1.0), number, place)
        for number, candidate in enumerate(candidates)
        for place, score in enumerate(np.sort(candidate.scores))
    )
    left = round(cutting.ratio * len(ranked))
    limits = [droppable(len(candidate.scores), len(candidate.scores), cutting) for candidate in candidates]
    asked = [0] * len(candidates)
    for _, number, _ in ranked:
        if left and asked[number] < limits[number]:
            asked[number] += 1
            left -= 1
    return [
        droppable(len(candidate.scores), count, cutting) for candidate, count in zip(candidates, asked, strict=True)
    ]
