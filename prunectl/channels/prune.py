"""Channel pruning from file to file: trace, plan, prune, verify, write, and the record for the manifest."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prunectl.analysis import sizes
from prunectl.analysis.stats import ModelStats, with_macs
from prunectl.analysis.tensor_io import Items, ProgressFactory, no_progress
from prunectl.analysis.timing import Latency
from prunectl.channels.adapter import GraphAdapter, RemovedIndices, WrittenNetwork, open_adapter, pruned_shape
from prunectl.channels.config import ChannelConfig, parse_config
from prunectl.channels.groups import ChannelGroup, PrunedGroup
from prunectl.channels.importance import calibration_batches, importance_inputs, shapes_of_data
from prunectl.channels.plan import ChannelPlan, Context, ImportanceInputs, ShapeOf, macs, make_plan, removed_indices
from prunectl.channels.rules import propagate
from prunectl.channels.verify import Verification, measure_latency, verify
from prunectl.errors import InputError, UsageError, WorkError
from prunectl.formats.base import Array, Capability, ModelFile
from prunectl.formats.registry import by_name, load, open_model
from prunectl.formats.registry import require as require_can
from prunectl.formats.safe_json import read_object
from prunectl.formats.scratch import temporary_folder
from prunectl.pruning import destination as outputs
from prunectl.pruning.destination import Destination
from prunectl.pruning.plan import SkippedTensor
from prunectl.pruning.request import PruneRequest
from prunectl.pruning.strip import stats_for_report
from prunectl.training.backend import LoadOptions


@dataclass(frozen=True, slots=True)
class ChannelPruneResult:
    """The report of channel pruning."""

    request: PruneRequest
    cutting: ChannelConfig
    pruned_groups: tuple[PrunedGroup, ...]
    skips: tuple[SkippedTensor, ...]
    """Groups that were not pruned, by the first weight that produces their channels, and why."""
    before: ModelStats
    after: ModelStats
    proof: Verification
    """The difference between the pruned network and the original with zeroed channels."""
    notes: tuple[str, ...] = ()
    """Sentences for the user about the written file."""
    latencies: tuple[Latency, ...] = ()
    """The latency for one example of the original and of the pruned network, if measured."""
    beside: tuple[tuple[str, int], ...] = ()
    """Files that were written beside the model, such as its class, and their bytes."""
    builder: str = ""
    """The class in such a file, as an argument for `--builder`."""
    limits: Mapping[str, Any] = field(default_factory=dict)
    """The options of channel pruning that `PruneRequest` does not have, as typed."""

    @property
    def channels(self) -> int:
        """The number of prunable channels."""
        return sum(len(pruned.group) for pruned in self.pruned_groups)

    @property
    def dropped(self) -> int:
        """The number of removed channels."""
        return sum(len(pruned.dropped) for pruned in self.pruned_groups)

    def record(self) -> Mapping[str, object]:
        """The limits and the removed channels, as JSON for the manifest."""
        return {
            "limits": {**self.limits},
            "channels": [
                {"name": pruned.group.name, "channels": len(pruned.group), "dropped": list(pruned.dropped)}
                for pruned in self.pruned_groups
            ],
            "removed": [
                {"tensor": tensor, "axis": axis, "indices": indices.tolist()}
                for (tensor, axis), indices in sorted(removed_indices(self.pruned_groups).items())
            ],
        }


def prune_channels(
    path: Path,
    request: PruneRequest,
    output: Destination | None,
    meter: ProgressFactory = no_progress,
    *,
    has_digests: bool = False,
    is_trusted: bool = False,
    has_latency: bool = False,
    allow_empty: bool = False,
    **limits: Any,
) -> ChannelPruneResult:
    """Prune channels of a model; without an output, into a scratch file that is measured and deleted.

    The limits are the keyword arguments of `parse_config`. WorkError if no channel is removed, unless the request asks
    for none or `allow_empty` is set. Progress is counted in steps: planned, verified, written.
    """
    config = parse_config(request, **limits)
    model = open_model(path)
    if request.is_matched:
        from prunectl.calibration.match import refuse_untrainable  # noqa: PLC0415 - most cuts train nothing

        refuse_untrainable(model, has_layers=False)
    if request.is_packed:
        require_can(model, Capability.PACK)
    outputs.check(model, output)
    origin = LoadOptions(
        request.model, request.custom_objects, is_trusted=is_trusted, seed=request.seed, inputs=request.inputs
    )

    def inputs_of(groups: Sequence[ChannelGroup], weights: Mapping[str, Array]) -> Mapping[str, Array]:
        return importance_inputs(model, groups, weights, config.importance, request, is_trusted=is_trusted)

    with outputs.staging_dir(model, output) as (folder, target):
        with meter(f"cutting channels of {path.name}", Items(3)) as bar:
            adapter = open_adapter(model, origin, shapes_of_data(request))
            _check_companion_files(adapter, output)
            trace = propagate(adapter.graph)
            before = with_graph_macs(_stats(model), adapter, trace.shape)
            plan = _plan(Context(model, adapter, trace, before), config, inputs_of)
            if not plan.removed and not allow_empty and not config.removes_nothing:
                raise _removes_nothing_error(path, plan, config)
            pruned = adapter.prune(plan.removed, plan.after, plan.weights)
            bar.advance(1)
            batches, notes = calibration_batches(model, adapter, request, config.importance)
            verification = verify(adapter, pruned, plan, config.seed, batches)
            if adapter.has_float64 and verification.error_float64 is None:
                notes = (*notes, _NOT_IN_FLOAT64)
            latencies = measure_latency(adapter, pruned, config.seed) if has_latency else ()
            bar.advance(1)
            written = adapter.write(pruned, folder, target)
            bar.advance(1)
        if request.is_matched:
            notes += _match(model, adapter, request, (folder, target), meter, is_trusted=is_trusted)
        if request.is_packed or model.about.is_compressed:
            # The output of a packed file is packed too.
            outputs.pack(written.path, folder)
        _check_shapes(model, adapter, written, plan)
        # Gzip takes a third of the time, so its size is measured only if that of the original was, or for a target.
        small = _stats(open_model(written.path), beside=model.nbytes, is_gzipped=request.target_gzip is not None)
        after = with_graph_macs(small, adapter, plan.after.shape, plan.removed)
        if has_digests:
            before = replace(before, sha256=sizes.sha256(model))
            after = replace(after, sha256=sizes.sha256(open_model(written.path)))
        companions = tuple((str(path), (folder / path.name).stat().st_size) for path in adapter.companion_files(target))
    display_path = str(target if output is not None else "the result")
    return ChannelPruneResult(
        request,
        config,
        plan.pruned_groups,
        plan.skips,
        before,
        replace(after, path=display_path),
        verification,
        (
            *adapter.notes,
            *written.notes,
            *adapter.assumptions,
            *dict.fromkeys(notes),
            *(() if plan.removed else ("No channel was removed.",)),
        ),
        latencies,
        companions if output is not None else (),
        f"{companions[0][0]}:{adapter.class_name}" if companions and adapter.class_name else "",
        limits,
    )


_NOT_IN_FLOAT64 = "The networks were compared in their own precision only: the original cannot run in float64."


def _plan(context: Context, config: ChannelConfig, inputs_of: ImportanceInputs) -> ChannelPlan:
    """Make the plan; the hint of a UsageError gets the assumptions about the inputs, which may be the cause."""
    try:
        return make_plan(context, config, inputs_of)
    except UsageError as error:
        assumptions = context.adapter.assumptions
        raise UsageError(error.message, hint="\n".join(filter(None, (*assumptions, error.hint)))) from error


def _match(
    model: ModelFile,
    adapter: GraphAdapter,
    request: PruneRequest,
    staged: tuple[Path, Path],
    meter: ProgressFactory,
    *,
    is_trusted: bool,
) -> tuple[str, ...]:
    """Train the pruned network to match the outputs of the original, and return notes for the user."""
    from prunectl.calibration.match import match_smaller  # noqa: PLC0415 - most cuts train nothing

    folder, target = staged
    code = [folder / path.name for path in adapter.companion_files(target)]
    with temporary_folder() as scratch:
        # Moved away, so that the trained network can be written to this path while the pruned one is read.
        shutil.move(folder / target.name, scratch / target.name)
        smaller = open_model(scratch / target.name)
        return match_smaller(
            model,
            smaller,
            request,
            outputs.staged_paths(smaller, folder, target),
            meter,
            builder=f"{code[0]}:{adapter.class_name}" if code and adapter.class_name else "",
            is_trusted=is_trusted,
        )


def _removes_nothing_error(path: Path, plan: ChannelPlan, config: ChannelConfig) -> WorkError:
    prunable = sum(len(pruned.group) for pruned in plan.pruned_groups)
    if config.only_dead:
        return WorkError(
            f"{path} has no dead channels; nothing was written",
            hint="write it unchanged with --allow-empty",
        )
    skipped = len(plan.skips)
    locked = (
        f", {skipped} {'groups of layers are' if skipped > 1 else 'group of layers is'} locked or excluded"
        if skipped
        else ""
    )
    return WorkError(
        f"no channel of {path} was removed: {prunable} could be{locked}; nothing was written",
        hint="raise --sparsity, lower --min-channels or --round-to, or use --allow-empty",
    )


def _check_companion_files(adapter: GraphAdapter, output: Destination | None) -> None:
    """Refuse companion files for standard output, and existing companion files that must not be replaced."""
    if output is None:
        return
    for path in adapter.companion_files(output.target):
        if output.to_stdout:
            raise UsageError(
                "the result consists of several files, which cannot be written to standard output",
                hint=f"write it to a file: -o OUT{path.suffix}",
            )
        if os.path.lexists(path) and not (output.is_forced or output.is_in_place):
            raise UsageError(f"{path} exists", hint="choose another --output, or replace it with --force")


def _check_shapes(model: ModelFile, adapter: GraphAdapter, written: WrittenNetwork, plan: ChannelPlan) -> None:
    """Compare the shapes in the written file with the plan."""
    shapes = {tensor.name: tensor.shape for tensor in open_model(written.path).tensors}
    omitted = adapter.omitted_tensors | written.omitted_tensors
    for tensor in model.tensors:
        name = adapter.coupled_tensors.get(tensor.name, tensor.name)
        shape = pruned_shape(name, tensor.shape, plan.removed)
        # Only float tensors are cut; integer tensors, such as lists of sizes, may have changed in other ways.
        if tensor.is_float and tensor.name not in omitted and shapes.get(tensor.name) != shape:
            raise WorkError(f"{tensor.name} of {model.path} has a different shape in the output than planned")


def _stats(model: ModelFile, *, beside: int = 0, is_gzipped: bool = False) -> ModelStats:
    stats = stats_for_report(model, beside=beside, is_gzipped=is_gzipped)
    graph = by_name(model.format).graph
    return with_macs(stats, load(graph)(model)) if graph else stats


def with_graph_macs(
    stats: ModelStats, adapter: GraphAdapter, shape_of: ShapeOf, removed: RemovedIndices | None = None
) -> ModelStats:
    """Statistics with the MACs of the channel graph, if those of the format's own graph are missing or incomplete."""
    if stats.macs is not None and not stats.macs_unknown:
        return stats
    return replace(stats, macs=macs(adapter.graph, shape_of, removed), macs_unknown=())


LIMITS = frozenset({"min_channels", "round_to", "max_ratio", "params", "flops", "dead"})
"""The options of channel pruning that `PruneRequest` does not have."""


def limits_in(path: Path) -> dict[str, Any]:
    """The options in LIMITS that a manifest records; the caller has checked the request in it."""
    limits = read_object(path, "it").get("limits", {})
    if not isinstance(limits, dict) or not limits.keys() <= LIMITS or not all(map(_is_plain, limits.values())):
        raise InputError(f"{path} holds invalid limits for channels")
    return limits


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool)
