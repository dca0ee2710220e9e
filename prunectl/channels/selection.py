"""Which channels go? Those with the lowest scores, as many as were asked for and as may."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from prunectl.channels.adapter import RemovedIndices
from prunectl.channels.config import ChannelConfig
from prunectl.channels.graph import ChannelGraph, OpKind, OpNode
from prunectl.channels.groups import ChannelGroup
from prunectl.channels.importance import Scores, group_importance, random_importance
from prunectl.channels.labels import LabelArray
from prunectl.errors import UsageError
from prunectl.formats.base import Array, ModelFile
from prunectl.formats.selectors import select_names
from prunectl.pruning.plan import Scope, SkippedTensor


@dataclass(frozen=True, slots=True)
class Candidate:
    """A family that may lose channels, and their scores."""

    family: ChannelGroup
    scores: Scores
    ratio: float | None = None
    """The share that is asked for, if it is another than that of the others."""


@dataclass(frozen=True, slots=True)
class PrunedGroup:
    """The channels of a family that go."""

    family: ChannelGroup
    dropped: tuple[int, ...]
    """Numbers of its groups."""

    @property
    def labels(self) -> tuple[int, ...]:
        """Labels of what goes."""
        return tuple(self.family.groups[number].label for number in self.dropped)


def choose(candidates: Sequence[Candidate], cutting: ChannelConfig) -> tuple[PrunedGroup, ...]:
    """Return what each family loses."""
    counts = _together(candidates, cutting) if cutting.scope is Scope.GLOBAL else _apart(candidates, cutting)
    return tuple(
        PrunedGroup(candidate.family, tuple(sorted(map(int, pruning_order(candidate.scores)[:count]))))
        for candidate, count in zip(candidates, counts, strict=True)
    )


def removed_indices(losses: Sequence[PrunedGroup]) -> Mapping[tuple[str, int], LabelArray]:
    """Return the indices that go, by weight and axis."""
    found: dict[tuple[str, int], list[int]] = {}
    for loss in losses:
        for number in loss.dropped:
            for member in loss.family.groups[number].members:
                found.setdefault((member.place.tensor, member.place.axis), []).extend(member.indices)
    return {place: np.unique(indices) for place, indices in found.items()}


def prunable_count(count: int, asked: int, cutting: ChannelConfig) -> int:
    """Return how many of so many channels go if so many are asked for: what stays is rounded up."""
    kept = max(count - asked, count - math.floor(cutting.max_ratio * count), min(cutting.min_channels, count))
    return count - min(count, math.ceil(kept / cutting.round_to) * cutting.round_to)


def pruning_order(scores: Scores) -> LabelArray:
    """Return the order in which channels go; of equals the first."""
    return np.argsort(scores, kind="stable")


def _apart(candidates: Sequence[Candidate], cutting: ChannelConfig) -> list[int]:
    return [prunable_count(len(candidate.scores), _asked(candidate, cutting), cutting) for candidate in candidates]


def _asked(candidate: Candidate, cutting: ChannelConfig) -> int:
    if candidate.ratio is None and cutting.threshold is not None:
        return int((candidate.scores <= 1 - cutting.threshold).sum())
    return round((cutting.ratio if candidate.ratio is None else candidate.ratio) * len(candidate.scores))


def _together(candidates: Sequence[Candidate], cutting: ChannelConfig) -> list[int]:
    """Rank all channels by their score over the mean of their family, and stop at what a family may lose."""
    ranked = sorted(
        (float(score) / (float(candidate.scores.mean()) or 1.0), number, place)
        for number, candidate in enumerate(candidates)
        for place, score in enumerate(np.sort(candidate.scores))
    )
    left = round(cutting.ratio * len(ranked))
    limits = [prunable_count(len(candidate.scores), len(candidate.scores), cutting) for candidate in candidates]
    asked = [0] * len(candidates)
    for _, number, _ in ranked:
        if left and asked[number] < limits[number]:
            asked[number] += 1
            left -= 1
    return [
        prunable_count(len(candidate.scores), count, cutting)
        for candidate, count in zip(candidates, asked, strict=True)
    ]


def candidates(
    model: ModelFile, families: Sequence[ChannelGroup], weights: Mapping[str, Array], cutting: ChannelConfig
) -> tuple[tuple[Candidate, ...], tuple[SkippedTensor, ...]]:
    """Return the families that are asked for and may be cut, and why the others are left alone."""
    only = _names(model, (cutting.only,)) if cutting.only else None
    excluded = _names(model, cutting.exclude)
    own = {tensor.name: ratio for selector, ratio in cutting.layers for tensor in select_names(model, selector)}
    found, skips = [], []
    for family in families:
        reason = _reason(family, only, excluded)
        scores = None if reason else _scores(family, weights, cutting)
        if scores is None:
            skips.append(SkippedTensor(family.name, reason or "nothing that the strategy looks at"))
        else:
            ratios = [own[name] for name in family.makers if name in own]
            found.append(Candidate(family, scores, ratios[-1] if ratios else None))
    if not found:
        reasons = Counter(skip.reason for skip in skips)
        told = ", ".join(f"{reason} ({number})" for reason, number in reasons.most_common(3))
        raise UsageError(
            f"{model.path} has no channels to cut: {told or 'no weight makes any'}",
            hint=f"prunectl inspect {model.path} --groups",
        )
    return tuple(found), tuple(skips)


def _names(model: ModelFile, selectors: Sequence[str]) -> set[str]:
    return {tensor.name for selector in selectors for tensor in select_names(model, selector)}


def _reason(family: ChannelGroup, only: set[str] | None, excluded: set[str]) -> str:
    if family.reason:
        return family.reason
    if excluded.intersection(family.makers):
        return "excluded"
    return "" if only is None or only.intersection(family.makers) else "not among --only"


def _scores(family: ChannelGroup, weights: Mapping[str, Array], cutting: ChannelConfig) -> Scores | None:
    if cutting.importance is None:
        return random_importance(family, cutting.seed)
    return group_importance(family, weights, cutting.importance)


ShapeOf = Callable[[str], tuple[int, ...]]


def macs(graph: ChannelGraph, shape_of: ShapeOf, removed: RemovedIndices | None = None) -> int:
    """Return the multiply-adds of one example in all operations that weights or products make up."""
    sizes = {
        name: math.prod(
            length - len((removed or {}).get((view.tensor, axis), ())) if axis is not None else 1
            for axis, length in zip(view.axes, graph.shapes[name], strict=True)
        )
        for name, view in graph.views.items()
    }
    return sum(_macs_of(node, shape_of, sizes) for node in graph.nodes)


def _macs_of(node: OpNode, shape_of: ShapeOf, sizes: Mapping[str, int]) -> int:
    if node.kind is OpKind.MATMUL:
        return math.prod(shape_of(node.outputs[0])) * shape_of(node.inputs[0])[-1]
    if node.kind is OpKind.ATTENTION:
        return _of_heads(node, shape_of, sizes)
    if len(node.inputs) < 2 or node.inputs[1] not in sizes:
        return 0
    match node.kind:
        case OpKind.CONVOLUTION:
            spread = node.inputs[0] if node.attributes["is_transposed"] else node.outputs[0]
            return sizes[node.inputs[1]] * math.prod(shape_of(spread)[2:])
        case OpKind.LINEAR:
            return sizes[node.inputs[1]] * math.prod(shape_of(node.inputs[0])[:-1])
        case OpKind.RECURRENT:
            steps = math.prod(shape_of(node.inputs[0])[:-1])
            return (sizes[node.inputs[1]] + sizes[node.inputs[2]]) * steps
        case _:
            return 0


def _of_heads(node: OpNode, shape_of: ShapeOf, sizes: Mapping[str, int]) -> int:
    """Return what the projections cost, and the two products of all positions with all positions."""
    steps = [math.prod(shape_of(data)[:-1]) for data in node.inputs[:3]]
    made = [sizes[kernel] // shape_of(data)[-1] for data, kernel in zip(node.inputs[:3], node.inputs[3:6], strict=True)]
    times = zip(node.inputs[3:7], (*steps, steps[0]), strict=True)
    # Numbers for each position in all heads: as many in a query as in a key.
    return sum(sizes[kernel] * count for kernel, count in times) + steps[0] * steps[1] * (made[0] + made[1])
