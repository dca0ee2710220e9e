"""Cutting channels out, from a file to a file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prunectl.channels.choose import Loss
from prunectl.channels.couple import Family
from prunectl.channels.cutting import Cutting, cutting_of
from prunectl.channels.given import given, shapes_of_data
from prunectl.channels.informed import looked_at
from prunectl.channels.languages import read
from prunectl.channels.latency import latency
from prunectl.channels.macs import ShapeOf, macs
from prunectl.channels.plan import Ground, Plan, planned
from prunectl.channels.proof import Proof, prove
from prunectl.channels.rules import follow
from prunectl.channels.source import Removed, Source, shape_left
from prunectl.errors import UsageError, WorkError
from prunectl.formats.base import Array, Can, ModelFile
from prunectl.formats.table import by_name, load, open_model
from prunectl.formats.table import require as require_can
from prunectl.measuring import archive
from prunectl.measuring.survey import Survey, with_macs
from prunectl.pruning import output as outputs
from prunectl.pruning.output import Output
from prunectl.pruning.plan import Skip
from prunectl.pruning.request import Request
from prunectl.pruning.strip import surveyed
from prunectl.training.network import Origin


@dataclass(frozen=True, slots=True)
class CutOut:
    """What was cut, and what came of it."""

    request: Request
    cutting: Cutting
    losses: tuple[Loss, ...]
    skips: tuple[Skip, ...]
    """Families that were left alone, by their first maker."""
    before: Survey
    after: Survey
    proof: Proof
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
    request: Request,
    output: Output | None,
    *,
    has_digests: bool = False,
    is_trusted: bool = False,
    has_latency: bool = False,
    allow_empty: bool = False,
    **limits: Any,
) -> CutOut:
    """Cut channels out of a model; without an output, into a scratch file that is measured and thrown away.

    The limits are those of `cutting_of`. A cut that removes nothing is refused, unless none was asked for or it is
    allowed to be empty.
    """
    cutting = cutting_of(request, **limits)
    model = open_model(path)
    if request.is_packed:
        require_can(model, Can.PACK)
    outputs.check(model, output)
    origin = Origin(
        request.model, request.custom_objects, is_trusted=is_trusted, seed=request.seed, inputs=request.inputs
    )
    source = read(model, origin, shapes_of_data(request))
    _check_beside(source, output)
    trace = follow(source.graph)
    before = with_own_macs(_measured(model), source, trace.shape)

    def looks(found: Sequence[Family], weights: Mapping[str, Array]) -> Mapping[str, Array]:
        return looked_at(model, found, weights, cutting.measure, request, is_trusted=is_trusted)

    try:
        plan = planned(Ground(model, source, trace, before), cutting, looks)
    except UsageError as error:
        raise UsageError(error.message, hint="\n".join(filter(None, (*source.doubts, error.hint)))) from error
    if not plan.gone and not allow_empty and not cutting.is_nothing:
        raise _empty(path, plan, cutting)
    smaller = source.cut(plan.gone, plan.after, plan.weights)
    inputs, notes = given(model, source, request, cutting.measure)
    proof = prove(source, smaller, plan, cutting.seed, inputs)
    if source.has_float64 and proof.wide is None:
        notes = (*notes, "The two networks were compared in their own precision alone: the original fails in float64.")
    seconds = latency(source, smaller, cutting.seed) if has_latency else None
    with outputs.workplace(model, output) as (folder, target):
        written = source.write(smaller, folder, target)
        if request.is_packed or model.about.is_compressed:
            # One that was packed comes out packed.
            outputs.pack(written, folder)
        _check(model, source, written, plan)
        after = with_own_macs(_measured(open_model(written)), source, plan.after.shape, plan.gone)
        if has_digests:
            before = replace(before, sha256=archive.sha256(model))
            after = replace(after, sha256=archive.sha256(open_model(written)))
        beside = tuple((str(path), (folder / path.name).stat().st_size) for path in source.beside(target))
    shown = str(target if output is not None else "the result")
    return CutOut(
        request,
        cutting,
        plan.losses,
        plan.skips,
        before,
        replace(after, path=shown),
        proof,
        (*source.notes, *source.doubts, *notes, *(() if plan.gone else ("The cut removed nothing.",))),
        seconds,
        beside if output is not None else (),
    )


def _empty(path: Path, plan: Plan, cutting: Cutting) -> WorkError:
    """Return why a cut that removes nothing was not made."""
    may = sum(len(loss.family.groups) for loss in plan.losses)
    if cutting.is_dead:
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


def _check_beside(source: Source, output: Output | None) -> None:
    """Refuse what more than one file would be written for, where that cannot be."""
    if output is None:
        return
    for path in source.beside(output.target):
        if output.is_stream:
            raise UsageError("the result is more than one file, and does not fit through standard output")
        if os.path.lexists(path) and not (output.is_forced or output.is_in_place):
            raise UsageError(f"{path} exists", hint="write elsewhere, or replace it with --force")


def _check(model: ModelFile, source: Source, written: Path, plan: Plan) -> None:
    """Hold the shapes of what was written against what was to be cut."""
    found = {tensor.name: tensor.shape for tensor in open_model(written).tensors}
    for tensor in model.tensors:
        name = source.followers.get(tensor.name, tensor.name)
        shape = shape_left(name, tensor.shape, plan.gone)
        # Lists of sizes may be others now; what is no float was not cut.
        if tensor.is_float and tensor.name not in source.dropped and found.get(tensor.name) != shape:
            raise WorkError(f"{tensor.name} of {model.path} came out with another shape than planned")


def _measured(model: ModelFile) -> Survey:
    found = surveyed(model)
    graph = by_name(model.format).graph
    return with_macs(found, load(graph)(model)) if graph else found


def with_own_macs(found: Survey, source: Source, shape_of: ShapeOf, removed: Removed | None = None) -> Survey:
    """Return a survey with all FLOPs, where the format itself has no graph or does not know every shape in it."""
    if found.macs is not None and not found.macs_unknown:
        return found
    return replace(found, macs=macs(source.graph, shape_of, removed), macs_unknown=())
