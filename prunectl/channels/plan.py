"""The plan of channel pruning: which indices are removed, and the shapes that remain."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from prunectl.analysis.sizes import CodecName, get_codec, measure
from prunectl.analysis.stats import ModelStats
from prunectl.channels.adapter import GraphAdapter, PrunedShapes, RemovedIndices, pruned_shape
from prunectl.channels.config import ChannelConfig, SizeTarget, TargetKind, smallest_ratio
from prunectl.channels.dead import find_dead
from prunectl.channels.graph import ChannelGraph, OpKind
from prunectl.channels.groups import ChannelGroup, find_groups
from prunectl.channels.labels import LabelTrace
from prunectl.channels.selection import Candidate, PrunedGroup, candidates, choose, macs, removed_indices
from prunectl.errors import UsageError
from prunectl.formats.base import Array, ModelFile
from prunectl.formats.registry import open_model
from prunectl.formats.scratch import temporary_folder
from prunectl.pruning.plan import SkippedTensor


@dataclass(frozen=True, slots=True)
class Context:
    """A network before pruning."""

    model: ModelFile
    adapter: GraphAdapter
    trace: LabelTrace
    before: ModelStats


ImportanceInputs = Callable[[Sequence[ChannelGroup], Mapping[str, Array]], Mapping[str, Array]]
"""From the groups and all weights to what is ranked by."""
_SHOWN_OPS = 4
_MAX_TRIES = 40
_WRITTEN_TRIES = 8
"""Where each one writes and compresses a network."""


@dataclass(frozen=True, slots=True)
class ChannelPlan:
    """The removed channels, their indices in each weight, and the shapes that remain."""

    pruned_groups: tuple[PrunedGroup, ...]
    removed: RemovedIndices
    after: PrunedShapes
    skips: tuple[SkippedTensor, ...] = ()
    weights: Mapping[str, Array] = field(default_factory=dict)
    """Weights that have other numbers even before they are cut."""
    is_lossless: bool = False


def make_plan(context: Context, config: ChannelConfig, looks: ImportanceInputs) -> ChannelPlan:
    """The plan of a configuration for a network."""
    trace, weights = context.trace, context.adapter.graph.weights
    groups = find_groups(trace)
    if not groups:
        raise UsageError(f"{context.model.path} has no channels to cut: {_unknown_ops(context.adapter.graph)}")
    if config.only_dead:
        selected, skips = candidates(context.model, groups, weights, config)
        dead = find_dead(context.adapter, trace, groups, [candidate.group for candidate in selected])
        return replace(
            _plan_of(trace, dead.pruned_groups), skips=(*skips, *dead.skips), weights=dead.weights, is_lossless=True
        )
    ranked, skips = candidates(context.model, groups, looks(groups, weights), config)
    if config.target is not None:
        config = replace(config, ratio=_ratio(context, ranked, config, config.target))
    return replace(_plan_of(trace, choose(ranked, config)), skips=skips)


def _unknown_ops(graph: ChannelGraph) -> str:
    """Why nothing in a graph makes channels."""
    names = dict.fromkeys(node.op for node in graph.nodes if node.kind is OpKind.UNKNOWN)
    listed = ", ".join([*names][:_SHOWN_OPS]) + (", …" if len(names) > _SHOWN_OPS else "")
    return f"what it consists of is not known ({listed})" if names else "no weight makes any"


def _plan_of(trace: LabelTrace, pruned_groups: Sequence[PrunedGroup]) -> ChannelPlan:
    return ChannelPlan(
        tuple(pruned_groups),
        removed_indices(pruned_groups),
        PrunedShapes(trace, [label for loss in pruned_groups for label in loss.labels]),
    )


def _ratio(context: Context, ranked: Sequence[Candidate], config: ChannelConfig, target: SizeTarget) -> float:
    """The smallest ratio of channels that reaches a target."""
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
