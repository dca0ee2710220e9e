"""What is to go, and what the network is without it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from prunectl.channels.after import After
from prunectl.channels.choose import Candidate, Loss, choose, removed
from prunectl.channels.couple import Family, families
from prunectl.channels.cutting import Cutting
from prunectl.channels.dead import dead
from prunectl.channels.goals import Goal, What, least
from prunectl.channels.graph import Graph, Kind
from prunectl.channels.macs import macs
from prunectl.channels.select import candidates
from prunectl.channels.source import Removed, Source, shape_left
from prunectl.channels.trace import Trace
from prunectl.errors import UsageError
from prunectl.formats.base import Array, ModelFile
from prunectl.formats.scratch import temporary_folder
from prunectl.formats.table import open_model
from prunectl.measuring.codecs import CodecName, pick
from prunectl.measuring.sizes import measure
from prunectl.measuring.survey import Survey
from prunectl.pruning.plan import Skip


@dataclass(frozen=True, slots=True)
class Ground:
    """A network, before anything is cut out of it."""

    model: ModelFile
    source: Source
    trace: Trace
    before: Survey


Looks = Callable[[Sequence[Family], Mapping[str, Array]], Mapping[str, Array]]
"""From the families and all weights to what is ranked by."""
_TOLD = 4
_TRIES = 40
_WRITTEN_TRIES = 8
"""Where each one writes and compresses a network."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What goes, where it lies, and what is left of every value."""

    losses: tuple[Loss, ...]
    gone: Removed
    after: After
    skips: tuple[Skip, ...] = ()
    weights: Mapping[str, Array] = field(default_factory=dict)
    """Weights that have other numbers even before they are cut."""
    is_lossless: bool = False


def planned(ground: Ground, cutting: Cutting, looks: Looks) -> Plan:
    """Return what is to go from a network, as was asked."""
    trace, weights = ground.trace, ground.source.graph.weights
    found = families(trace)
    if not found:
        raise UsageError(f"{ground.model.path} has no channels to cut: {_unknown(ground.source.graph)}")
    if cutting.is_dead:
        wanted, skips = candidates(ground.model, found, weights, cutting)
        lost = dead(ground.source, trace, found, [candidate.family for candidate in wanted])
        return replace(_of(trace, lost.losses), skips=(*skips, *lost.skips), weights=lost.weights, is_lossless=True)
    chosen, skips = candidates(ground.model, found, looks(found, weights), cutting)
    if cutting.goal is not None:
        cutting = replace(cutting, ratio=_ratio(ground, chosen, cutting, cutting.goal))
    return replace(_of(trace, choose(chosen, cutting)), skips=skips)


def _unknown(graph: Graph) -> str:
    """Return why nothing in a graph makes channels."""
    names = dict.fromkeys(node.op for node in graph.nodes if node.kind is Kind.UNKNOWN)
    told = ", ".join([*names][:_TOLD]) + (", …" if len(names) > _TOLD else "")
    return f"what it consists of is not known ({told})" if names else "no weight makes any"


def _of(trace: Trace, losses: Sequence[Loss]) -> Plan:
    return Plan(tuple(losses), removed(losses), After(trace, [label for loss in losses for label in loss.labels]))


def _ratio(ground: Ground, chosen: Sequence[Candidate], cutting: Cutting, goal: Goal) -> float:
    """Return the smallest share of channels that reaches a goal."""
    measures: Mapping[What, Callable[[Plan], int]] = {
        What.PARAMS: partial(_params, ground),
        What.FLOPS: lambda plan: 2 * macs(ground.source.graph, plan.after.shape, plan.gone),
        What.GZIP: partial(_gzipped, ground),
    }
    left = measures[goal.what]

    def tried(ratio: float) -> int:
        return left(_of(ground.trace, choose(chosen, replace(cutting, ratio=ratio))))

    channels = sum(len(candidate.family.groups) for candidate in chosen)
    tries = _WRITTEN_TRIES if goal.what is What.GZIP else _TRIES
    return least(goal, left(_of(ground.trace, ())), channels, tried, tries)


def _params(ground: Ground, plan: Plan) -> int:
    lost = 0
    for tensor in ground.model.tensors:
        lost += tensor.size - math.prod(shape_left(tensor.name, tensor.shape, plan.gone))
    return ground.before.params.total - lost


def _gzipped(ground: Ground, plan: Plan) -> int:
    with temporary_folder() as folder:
        smaller = ground.source.cut(plan.gone, plan.after, plan.weights)
        written = ground.source.write(smaller, folder, folder / ground.model.path.name)
        return measure(open_model(written), pick(CodecName.GZIP, None)).bytes.compressed or 0
