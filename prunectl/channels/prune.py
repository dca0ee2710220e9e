"""Cutting channels out, from a file to a file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prunectl.analysis import sizes
from prunectl.analysis.stats import ModelStats, with_macs
from prunectl.channels.adapter import GraphAdapter, RemovedIndices, pruned_shape
from prunectl.channels.config import ChannelConfig, parse_config
from prunectl.channels.frontends import open_adapter
from prunectl.channels.groups import ChannelGroup
from prunectl.channels.importance import importance_inputs, load_inputs, shapes_of_data
from prunectl.channels.plan import ChannelPlan, Context, make_plan
from prunectl.channels.rules import propagate
from prunectl.channels.selection import PrunedGroup, ShapeOf, macs
from prunectl.channels.verify import Verification, latency, verify
from prunectl.errors import UsageError, WorkError
from prunectl.formats.base import Array, Capability, ModelFile
from prunectl.formats.registry import by_name, load, open_model
from prunectl.formats.registry import require as require_can
from prunectl.pruning import destination as outputs
from prunectl.pruning.destination import Destination
from prunectl.pruning.plan import SkippedTensor
from prunectl.pruning.request import PruneRequest
from prunectl.pruning.strip import stats_for_report
from prunectl.training.backend import ModelOrigin


@dataclass(frozen=True, slots=True)
class ChannelPruneResult:
    """What was cut, and what came of it."""

    request: PruneRequest
    cutting: ChannelConfig
    losses: tuple[PrunedGroup, ...]
    skips: tuple[SkippedTensor, ...]
    """Families that were left alone, by their first maker."""
    before: ModelStats
    after: ModelStats
    proof: Verification
    """How far the cut network is from the original with its channels silenced."""
    notes: tuple[str, ...] = ()
    """What a user should know about what was written."""
    seconds: tuple[float, float] | None = None
    """How long both take for one example, if that was measured."""
    beside: tuple[tuple[str, int], ...] = ()
    """Files that were written with the model, such as its class, and their bytes."""

    @property
    def channels(self) -> int:
        """How many channels could go."""
        return sum(len(loss.family.groups) for loss in self.losses)

    @property
    def dropped(self) -> int:
        """How many went."""
        return sum(len(loss.dropped) for loss in self.losses)


def prune_channels(
    path: Path,
    request: PruneRequest,
    output: Destination | None,
    *,
    has_digests: bool = False,
    is_trusted: bool = False,
    has_latency: bool = False,
    allow_empty: bool = False,
    **limits: Any,
) -> ChannelPruneResult:
    """Cut channels out of a model; without an output, into a scratch file that is measured and thrown away.

    The limits are those of `cutting_of`. A cut that removes nothing is refused, unless none was asked for or it is
    allowed to be empty.
    """
    cutting = parse_config(request, **limits)
    model = open_model(path)
    if request.is_packed:
        require_can(model, Capability.PACK)
    outputs.check(model, output)
    origin = ModelOrigin(
        request.model, request.custom_objects, is_trusted=is_trusted, seed=request.seed, inputs=request.inputs
    )
    source = open_adapter(model, origin, shapes_of_data(request))
    _check_beside(source, output)
    trace = propagate(source.graph)
    before = with_graph_macs(_measured(model), source, trace.shape)

    def looks(found: Sequence[ChannelGroup], weights: Mapping[str, Array]) -> Mapping[str, Array]:
        return importance_inputs(model, found, weights, cutting.importance, request, is_trusted=is_trusted)

    try:
        plan = make_plan(Context(model, source, trace, before), cutting, looks)
    except UsageError as error:
        raise UsageError(error.message, hint="\n".join(filter(None, (*source.assumptions, error.hint)))) from error
    if not plan.gone and not allow_empty and not cutting.removes_nothing:
        raise _empty(path, plan, cutting)
    smaller = source.prune(plan.gone, plan.after, plan.weights)
    inputs, notes = load_inputs(model, source, request, cutting.importance)
    proof = verify(source, smaller, plan, cutting.seed, inputs)
    if source.has_float64 and proof.error_float64 is None:
        notes = (*notes, "The two networks were compared in their own precision alone: the original fails in float64.")
    seconds = latency(source, smaller, cutting.seed) if has_latency else None
    with outputs.staging_dir(model, output) as (folder, target):
        written = source.write(smaller, folder, target)
        if request.is_packed or model.about.is_compressed:
            # One that was packed comes out packed.
            outputs.pack(written, folder)
        _check(model, source, written, plan)
        after = with_graph_macs(_measured(open_model(written)), source, plan.after.shape, plan.gone)
        if has_digests:
            before = replace(before, sha256=sizes.sha256(model))
            after = replace(after, sha256=sizes.sha256(open_model(written)))
        beside = tuple((str(path), (folder / path.name).stat().st_size) for path in source.companion_files(target))
    shown = str(target if output is not None else "the result")
    return ChannelPruneResult(
        request,
        cutting,
        plan.losses,
        plan.skips,
        before,
        replace(after, path=shown),
        proof,
        (*source.notes, *source.assumptions, *notes, *(() if plan.gone else ("The cut removed nothing.",))),
        seconds,
        beside if output is not None else (),
    )


def _empty(path: Path, plan: ChannelPlan, cutting: ChannelConfig) -> WorkError:
    """Return why a cut that removes nothing was not made."""
    may = sum(len(loss.family.groups) for loss in plan.losses)
    if cutting.only_dead:
        return WorkError(
            f"{path} has no channels that make no difference; nothing was written",
            hint="--allow-empty writes it as it is",
        )
    left = len(plan.skips)
    locked = f", {left} {'groups of layers are' if left > 1 else 'group of layers is'} left alone" if left else ""
    return WorkError(
        f"this cut removes nothing from {path}: none of {may} channels that may go{locked}; nothing was written",
        hint="ask for more, lower --min-channels or --round-to, or say --allow-empty",
    )


def _check_beside(source: GraphAdapter, output: Destination | None) -> None:
    """Refuse what more than one file would be written for, where that cannot be."""
    if output is None:
        return
    for path in source.companion_files(output.target):
        if output.to_stdout:
            raise UsageError("the result is more than one file, and does not fit through standard output")
        if os.path.lexists(path) and not (output.is_forced or output.is_in_place):
            raise UsageError(f"{path} exists", hint="write elsewhere, or replace it with --force")


def _check(model: ModelFile, source: GraphAdapter, written: Path, plan: ChannelPlan) -> None:
    """Hold the shapes of what was written against what was to be cut."""
    found = {tensor.name: tensor.shape for tensor in open_model(written).tensors}
    for tensor in model.tensors:
        name = source.coupled_tensors.get(tensor.name, tensor.name)
        shape = pruned_shape(name, tensor.shape, plan.gone)
        # Lists of sizes may be others now; what is no float was not cut.
        if tensor.is_float and tensor.name not in source.omitted_tensors and found.get(tensor.name) != shape:
            raise WorkError(f"{tensor.name} of {model.path} came out with another shape than planned")


def _measured(model: ModelFile) -> ModelStats:
    found = stats_for_report(model)
    graph = by_name(model.format).graph
    return with_macs(found, load(graph)(model)) if graph else found


def with_graph_macs(
    found: ModelStats, source: GraphAdapter, shape_of: ShapeOf, removed: RemovedIndices | None = None
) -> ModelStats:
    """Return a survey with all FLOPs, where the format itself has no graph or does not know every shape in it."""
    if found.macs is not None and not found.macs_unknown:
        return found
    return replace(found, macs=macs(source.graph, shape_of, removed), macs_unknown=())
