"""What is to go, and what the network is without it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from prunectl.channels.after import After
from prunectl.channels.choose import Candidate, Loss, choose, removed
from prunectl.channels.couple import families
from prunectl.channels.cutting import Cutting
from prunectl.channels.dead import dead
from prunectl.channels.goals import Goal, What, least
from prunectl.channels.macs import macs
from prunectl.channels.select import candidates
from prunectl.channels.source import Removed, Source
from prunectl.channels.trace import Trace
from prunectl.formats.base import Array, ModelFile
from prunectl.formats.table import open_model
from prunectl.measuring.codecs import CodecName, pick
from prunectl.measuring.sizes import measure
from prunectl.measuring.survey import Survey
from prunectl.pruning.plan import Skip

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


def planned(model: ModelFile, source: Source, trace: Trace, cutting: Cutting, before: Survey) -> Plan:
    """Return what is to go from a network, as was asked."""
    found = families(trace)
    if cutting.is_dead:
        wanted, skips = candidates(model, found, source.graph.weights, cutting)
        lost = dead(source, trace, found, [candidate.family for candidate in wanted])
        return replace(_of(trace, lost.losses), skips=(*skips, *lost.skips), weights=lost.weights, is_lossless=True)
    chosen, skips = candidates(model, found, source.graph.weights, cutting)
    if cutting.goal is not None:
        cutting = replace(
            cutting,
            ratio=_ratio(model, source, trace, chosen=chosen, cutting=cutting, goal=cutting.goal, before=before),
        )
    return replace(_of(trace, choose(chosen, cutting)), skips=skips)


def _of(trace: Trace, losses: Sequence[Loss]) -> Plan:
    return Plan(tuple(losses), removed(losses), After(trace, [label for loss in losses for label in loss.labels]))


def _ratio(
    model: ModelFile,
    source: Source,
    trace: Trace,
    *,
    chosen: Sequence[Candidate],
    cutting: Cutting,
    goal: Goal,
    before: Survey,
) -> float:
    """Return the smallest share of channels that reaches a goal."""
    measures: Mapping[What, Callable[[Plan], int]] = {
        What.PARAMS: partial(_params, model, before),
        What.FLOPS: lambda plan: 2 * macs(source.graph, plan.after.shape, plan.gone),
        What.GZIP: partial(_gzipped, model, source),
    }
    left = measures[goal.what]
    channels = sum(len(candidate.family.groups) for candidate in chosen)
    tries = _WRITTEN_TRIES if goal.what is What.GZIP else _TRIES
    start = left(_of(trace, ()))
    return least(
        goal, start, channels, lambda ratio: left(_of(trace, choose(chosen, replace(cutting, ratio=ratio)))), tries
    )


def _params(model: ModelFile, before: Survey, plan: Plan) -> int:
    lost = 0
    for tensor in model.tensors:
        size = 1
        for axis, length in enumerate(tensor.shape):
            size *= length - len(plan.gone.get((tensor.name, axis), ()))
        lost += tensor.size - size
    return before.params.total - lost


def _gzipped(model: ModelFile, source: Source, plan: Plan) -> int:
    with tempfile.TemporaryDirectory(prefix="prunectl-") as name:
        folder = Path(name)
        written = source.write(source.cut(plan.gone, plan.after, {}), folder, folder / model.path.name)
        return measure(open_model(written), pick(CodecName.GZIP, None)).bytes.compressed or 0
