"""What is to go, and what the network is without it."""

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
    """A network, before anything is cut out of it."""

    model: ModelFile
    source: GraphAdapter
    trace: LabelTrace
    before: ModelStats


ImportanceInputs = Callable[[Sequence[ChannelGroup], Mapping[str, Array]], Mapping[str, Array]]
"""From the families and all weights to what is ranked by."""
_TOLD = 4
_TRIES = 40
_WRITTEN_TRIES = 8
"""Where each one writes and compresses a network."""


@dataclass(frozen=True, slots=True)
class ChannelPlan:
    """What goes, where it lies, and what is left of every value."""

    losses: tuple[PrunedGroup, ...]
    gone: RemovedIndices
    after: PrunedShapes
    skips: tuple[SkippedTensor, ...] = ()
    weights: Mapping[str, Array] = field(default_factory=dict)
    """Weights that have other numbers even before they are cut."""
    is_lossless: bool = False


def make_plan(ground: Context, cutting: ChannelConfig, looks: ImportanceInputs) -> ChannelPlan:
    """Return what is to go from a network, as was asked."""
    trace, weights = ground.trace, ground.source.graph.weights
    found = find_groups(trace)
    if not found:
        raise UsageError(f"{ground.model.path} has no channels to cut: {_unknown(ground.source.graph)}")
    if cutting.only_dead:
        wanted, skips = candidates(ground.model, found, weights, cutting)
        lost = find_dead(ground.source, trace, found, [candidate.family for candidate in wanted])
        return replace(_of(trace, lost.losses), skips=(*skips, *lost.skips), weights=lost.weights, is_lossless=True)
    chosen, skips = candidates(ground.model, found, looks(found, weights), cutting)
    if cutting.target is not None:
        cutting = replace(cutting, ratio=_ratio(ground, chosen, cutting, cutting.target))
    return replace(_of(trace, choose(chosen, cutting)), skips=skips)


def _unknown(graph: ChannelGraph) -> str:
    """Return why nothing in a graph makes channels."""
    names = dict.fromkeys(node.op for node in graph.nodes if node.kind is OpKind.UNKNOWN)
    told = ", ".join([*names][:_TOLD]) + (", …" if len(names) > _TOLD else "")
    return f"what it consists of is not known ({told})" if names else "no weight makes any"


def _of(trace: LabelTrace, losses: Sequence[PrunedGroup]) -> ChannelPlan:
    return ChannelPlan(
        tuple(losses), removed_indices(losses), PrunedShapes(trace, [label for loss in losses for label in loss.labels])
    )


def _ratio(ground: Context, chosen: Sequence[Candidate], cutting: ChannelConfig, goal: SizeTarget) -> float:
    """Return the smallest share of channels that reaches a goal."""
    measures: Mapping[TargetKind, Callable[[ChannelPlan], int]] = {
        TargetKind.PARAMS: partial(_params, ground),
        TargetKind.FLOPS: lambda plan: 2 * macs(ground.source.graph, plan.after.shape, plan.gone),
        TargetKind.GZIP: partial(_gzipped, ground),
    }
    left = measures[goal.kind]

    def tried(ratio: float) -> int:
        return left(_of(ground.trace, choose(chosen, replace(cutting, ratio=ratio))))

    channels = sum(len(candidate.family.groups) for candidate in chosen)
    tries = _WRITTEN_TRIES if goal.kind is TargetKind.GZIP else _TRIES
    return smallest_ratio(goal, left(_of(ground.trace, ())), channels, tried, tries)


def _params(ground: Context, plan: ChannelPlan) -> int:
    lost = 0
    for tensor in ground.model.tensors:
        lost += tensor.size - math.prod(pruned_shape(tensor.name, tensor.shape, plan.gone))
    return ground.before.params.total - lost


def _gzipped(ground: Context, plan: ChannelPlan) -> int:
    with temporary_folder() as folder:
        smaller = ground.source.prune(plan.gone, plan.after, plan.weights)
        written = ground.source.write(smaller, folder, folder / ground.model.path.name)
        return measure(open_model(written), get_codec(CodecName.GZIP, None)).bytes.compressed or 0
