"""The plan of channel pruning: the channels to remove, their indices in each weight, and the remaining shapes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from prunectl.analysis.sizes import CodecName, get_codec, measure
from prunectl.analysis.stats import ModelStats
from prunectl.channels.adapter import GraphAdapter, PrunedShapes, RemovedIndices, pruned_shape
from prunectl.channels.config import ChannelConfig, SizeTarget, TargetKind, smallest_ratio
from prunectl.channels.dead import find_dead
from prunectl.channels.graph import ChannelGraph, OpKind, OpNode
from prunectl.channels.groups import ChannelGroup, PrunedGroup, find_groups, why_no_channels
from prunectl.channels.importance import Scores, group_importance, random_importance
from prunectl.channels.labels import LabelArray, LabelTrace
from prunectl.errors import UsageError
from prunectl.formats.base import Array, ModelFile, select_names
from prunectl.formats.registry import open_model
from prunectl.formats.scratch import temporary_folder
from prunectl.pruning.plan import Scope, SkippedTensor


@dataclass(frozen=True, slots=True)
class Context:
    """A network before pruning."""

    model: ModelFile
    adapter: GraphAdapter
    trace: LabelTrace
    before: ModelStats


ImportanceInputs = Callable[[Sequence[ChannelGroup], Mapping[str, Array]], Mapping[str, Array]]
"""From the groups and all weights to the arrays that the importance scores, by the name of the weight."""
_MAX_TRIES = 40
_WRITTEN_TRIES = 8
"""The tries for a target of compressed bytes, each of which writes and compresses a network."""


@dataclass(frozen=True, slots=True)
class ChannelPlan:
    """The removed channels, their indices in each weight, and the remaining shapes."""

    pruned_groups: tuple[PrunedGroup, ...]
    removed: RemovedIndices
    after: PrunedShapes
    skips: tuple[SkippedTensor, ...] = ()
    weights: Mapping[str, Array] = field(default_factory=dict)
    """The weights that get new values before they are cut, as constants of dead channels are folded into them."""
    is_lossless: bool = False
    """Whether only dead channels are removed, which does not change the outputs."""


def make_plan(context: Context, config: ChannelConfig, inputs_of: ImportanceInputs) -> ChannelPlan:
    """Plan the removal of channels from a network."""
    trace, weights = context.trace, context.adapter.graph.weights
    groups = find_groups(trace)
    if not groups:
        raise UsageError(
            f"{context.model.path} has no channels that can be removed: {why_no_channels(context.adapter.graph)}"
        )
    if config.only_dead:
        selected, skips = candidates(context.model, groups, weights, config)
        dead = find_dead(context.adapter, trace, groups, [candidate.group for candidate in selected])
        return replace(
            _plan_of(trace, dead.pruned_groups), skips=(*skips, *dead.skips), weights=dead.weights, is_lossless=True
        )
    ranked, skips = candidates(context.model, groups, inputs_of(groups, weights), config)
    if config.target is not None:
        config = replace(config, ratio=_ratio(context, ranked, config, config.target))
    return replace(_plan_of(trace, choose(ranked, config)), skips=skips)


def _plan_of(trace: LabelTrace, pruned_groups: Sequence[PrunedGroup]) -> ChannelPlan:
    return ChannelPlan(
        tuple(pruned_groups),
        removed_indices(pruned_groups),
        PrunedShapes(trace, [label for pruned in pruned_groups for label in pruned.labels]),
    )


def _ratio(context: Context, ranked: Sequence[Candidate], config: ChannelConfig, target: SizeTarget) -> float:
    measures: Mapping[TargetKind, Callable[[ChannelPlan], int]] = {
        TargetKind.PARAMS: partial(_params_left, context),
        TargetKind.FLOPS: lambda plan: 2 * macs(context.adapter.graph, plan.after.shape, plan.removed),
        TargetKind.GZIP: partial(_gzip_bytes_left, context),
    }
    count_left = measures[target.kind]

    def left_at(ratio: float) -> int:
        return count_left(_plan_of(context.trace, choose(ranked, replace(config, ratio=ratio))))

    channels = sum(len(candidate.group) for candidate in ranked)
    tries = _WRITTEN_TRIES if target.kind is TargetKind.GZIP else _MAX_TRIES
    return smallest_ratio(target, count_left(_plan_of(context.trace, ())), channels, left_at, tries)


def _params_left(context: Context, plan: ChannelPlan) -> int:
    removed = 0
    for tensor in context.model.tensors:
        removed += tensor.size - math.prod(pruned_shape(tensor.name, tensor.shape, plan.removed))
    return context.before.params.total - removed


def _gzip_bytes_left(context: Context, plan: ChannelPlan) -> int:
    with temporary_folder() as folder:
        pruned = context.adapter.prune(plan.removed, plan.after, plan.weights)
        written = context.adapter.write(pruned, folder, folder / context.model.path.name)
        return measure(open_model(written.path), get_codec(CodecName.GZIP, None)).bytes.compressed or 0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A prunable group with its scores."""

    group: ChannelGroup
    scores: Scores
    ratio: float | None = None
    """The ratio that `--layer` sets for this group; None for the ratio of the configuration."""


def choose(candidates: Sequence[Candidate], config: ChannelConfig) -> tuple[PrunedGroup, ...]:
    """The channels to remove from each candidate, those with the lowest scores."""
    counts = (
        _counts_over_all(candidates, config) if config.scope is Scope.GLOBAL else _counts_by_layer(candidates, config)
    )
    return tuple(
        PrunedGroup(candidate.group, tuple(sorted(map(int, pruning_order(candidate.scores)[:count]))))
        for candidate, count in zip(candidates, counts, strict=True)
    )


def removed_indices(pruned: Sequence[PrunedGroup]) -> Mapping[tuple[str, int], LabelArray]:
    """The indices that are removed, by weight and axis."""
    indices: dict[tuple[str, int], list[LabelArray]] = {}
    for part in pruned:
        channels = np.zeros(len(part.group), np.bool_)
        channels[list(part.dropped)] = True
        for axis, slices in zip(part.group.axes, part.group.slices, strict=True):
            if part.dropped:
                indices.setdefault((axis.tensor, axis.axis), []).append(slices.of(channels))
    return {axis: np.unique(np.concatenate(parts)) for axis, parts in indices.items()}


def prunable_count(count: int, requested: int, config: ChannelConfig) -> int:
    """The number of channels to remove so that the number of kept ones respects the limits of the configuration."""
    kept = max(count - requested, count - math.floor(config.max_ratio * count), min(config.min_channels, count))
    return count - min(count, math.ceil(kept / config.round_to) * config.round_to)


def pruning_order(scores: Scores) -> LabelArray:
    """Channel numbers in the order of removal; of equal scores the first comes first."""
    return np.argsort(scores, kind="stable")


def _counts_by_layer(candidates: Sequence[Candidate], config: ChannelConfig) -> list[int]:
    return [prunable_count(len(candidate.scores), _requested(candidate, config), config) for candidate in candidates]


def _requested(candidate: Candidate, config: ChannelConfig) -> int:
    if candidate.ratio is None and config.threshold is not None:
        return int((candidate.scores <= 1 - config.threshold).sum())
    return round((config.ratio if candidate.ratio is None else candidate.ratio) * len(candidate.scores))


def _counts_over_all(candidates: Sequence[Candidate], config: ChannelConfig) -> list[int]:
    """Rank the channels of all groups by score / mean score of the group; no group loses more than its limits allow."""
    ranked = sorted(
        (float(score) / (float(candidate.scores.mean()) or 1.0), number, rank)
        for number, candidate in enumerate(candidates)
        for rank, score in enumerate(np.sort(candidate.scores))
    )
    remaining = round(config.ratio * len(ranked))
    limits = [prunable_count(len(candidate.scores), len(candidate.scores), config) for candidate in candidates]
    requested = [0] * len(candidates)
    for _, number, _ in ranked:
        if remaining and requested[number] < limits[number]:
            requested[number] += 1
            remaining -= 1
    return [
        prunable_count(len(candidate.scores), count, config)
        for candidate, count in zip(candidates, requested, strict=True)
    ]


def candidates(
    model: ModelFile, groups: Sequence[ChannelGroup], weights: Mapping[str, Array], config: ChannelConfig
) -> tuple[tuple[Candidate, ...], tuple[SkippedTensor, ...]]:
    """The groups that are selected and can be pruned, with their scores, and why the others are skipped."""
    only = _names(model, (config.only,)) if config.only else None
    excluded = _names(model, config.exclude)
    layer_ratios = {tensor.name: ratio for selector, ratio in config.layers for tensor in select_names(model, selector)}
    selected, skips = [], []
    for group in groups:
        reason = _reason(group, only, excluded)
        scores = None if reason else _scores(group, weights, config)
        if scores is None:
            skips.append(SkippedTensor(group.name, reason or "the strategy has no score for it"))
        else:
            ratios = [layer_ratios[name] for name in group.producers if name in layer_ratios]
            selected.append(Candidate(group, scores, ratios[-1] if ratios else None))
    if not selected:
        reasons = Counter(skip.reason for skip in skips)
        listed = ", ".join(
            f"{reason} ({number} groups)" if number > 1 else reason for reason, number in reasons.most_common(3)
        )
        raise UsageError(
            f"{model.path} has no channels that can be removed: {listed or 'no weight produces channels'}",
            hint=f"see why: prunectl inspect {model.path} --groups",
        )
    return tuple(selected), tuple(skips)


def _names(model: ModelFile, selectors: Sequence[str]) -> set[str]:
    return {tensor.name for selector in selectors for tensor in select_names(model, selector)}


def _reason(group: ChannelGroup, only: set[str] | None, excluded: set[str]) -> str:
    if group.locked_because:
        return group.locked_because
    if excluded.intersection(group.producers):
        return "excluded"
    return "" if only is None or only.intersection(group.producers) else "not selected by --layers"


def _scores(group: ChannelGroup, weights: Mapping[str, Array], config: ChannelConfig) -> Scores | None:
    if config.importance is None:
        return random_importance(group, config.seed)
    return group_importance(group, weights, config.importance)


ShapeOf = Callable[[str], tuple[int, ...]]


def macs(graph: ChannelGraph, shape_of: ShapeOf, removed: RemovedIndices | None = None) -> int:
    """The multiply-accumulates for one example of convolutions, dense, recurrent and attention layers, and products."""
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
        return _attention_macs(node, shape_of, sizes)
    if len(node.inputs) < 2 or node.inputs[1] not in sizes:
        return 0
    match node.kind:
        case OpKind.CONVOLUTION:
            spread = node.inputs[0] if node.attributes["is_transposed"] else node.outputs[0]
            return sizes[node.inputs[1]] * math.prod(shape_of(spread)[2:])
        case OpKind.LINEAR:
            return sizes[node.inputs[1]] * math.prod(shape_of(node.inputs[0])[:-1])
        case OpKind.RECURRENT:
            positions: int = node.attributes.get("positions") or math.prod(shape_of(node.inputs[0])[:-1])
            return (sizes[node.inputs[1]] + sizes[node.inputs[2]]) * positions
        case _:
            return 0


def _attention_macs(node: OpNode, shape_of: ShapeOf, sizes: Mapping[str, int]) -> int:
    """The multiply-accumulates of the projections, of queries with keys, and of attention weights with values."""
    steps = [math.prod(shape_of(data)[:-1]) for data in node.inputs[:3]]
    dims = [sizes[kernel] // shape_of(data)[-1] for data, kernel in zip(node.inputs[:3], node.inputs[3:6], strict=True)]
    times = zip(node.inputs[3:7], (*steps, steps[0]), strict=True)
    # The queries of all heads have as many dimensions as the keys.
    return sum(sizes[kernel] * count for kernel, count in times) + steps[0] * steps[1] * (dims[0] + dims[1])
