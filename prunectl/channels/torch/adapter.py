"""The adapter of PyTorch files: it prunes the traced torch.fx graph of a network."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import Dim, ExportedProgram

from prunectl.channels.adapter import (
    Axes,
    Feeds,
    GraphAdapter,
    PrunedShapes,
    RemovedIndices,
    Runner,
    WrittenNetwork,
    outputs_of_weighted_layers,
    removed_by_tensor,
)
from prunectl.channels.graph import ChannelGraph, OpNode
from prunectl.channels.lengths import DataShapes
from prunectl.channels.torch.checkpoint import (
    OptimizerSlots,
    PrunedProgram,
    WeightChanges,
    class_of,
    companion_file,
    delete_tensor_indices,
    load_checkpoint,
    optimizer_slots,
    parameter_order,
    write_weights,
)
from prunectl.channels.torch.export import Examples, TracedModel, random_like, trace_model
from prunectl.channels.torch.fx import OpContext, WeightedProgram, attribute, is_item, quiet, shapes_of, uses, views
from prunectl.channels.torch.fx import run as run_program
from prunectl.channels.torch.ops import lower, resize
from prunectl.errors import InputError, UsageError, WorkError, first_line
from prunectl.formats.base import Array, Family, ModelFile
from prunectl.formats.scratch import temporary_folder
from prunectl.training.backend import LoadOptions
from prunectl.training.torch.tensors import to_numpy, to_torch, view_as_torch


def read_torch(model: ModelFile, origin: LoadOptions, data: DataShapes | None = None) -> TorchAdapter:
    """The adapter of a PyTorch file; `origin` gives the builder of the network if the file holds only weights.

    The network is traced on the shapes of `--input`; the shapes of the data are not used.
    """
    del data
    if origin.custom_objects:
        raise UsageError("--custom-objects is for Keras models", hint="leave out --custom-objects")
    return TorchAdapter(model, trace_model(model, origin))


class TorchAdapter(GraphAdapter):
    """A PyTorch network as a prunable graph."""

    def __init__(self, model: ModelFile, traced: TracedModel) -> None:
        self._model = model
        self._traced = traced
        self._graph = graph_of(model, traced)

    @property
    def graph(self) -> ChannelGraph:
        return self._graph

    @property
    def omitted_tensors(self) -> frozenset[str]:
        """The states of optimizers that cannot be matched to weights."""
        prefixes = tuple(f"{name}.state." if name else "state." for name in self._slots.unmatched)
        return frozenset(tensor.name for tensor in self._model.tensors if tensor.name.startswith(prefixes))

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on the class that is written beside weights, and on optimizer state that is left out."""
        if self._is_program:
            return ()
        omitted = ", ".join(name or "the file" for name in self._slots.unmatched)
        state = f"The optimizer state of {omitted} was left out: it cannot be matched to the weights."
        subject = "The file now holds only weights; the" if self._traced.holds_module else "The"
        batch = len(self._traced.single_inputs[0])
        batch_note = f", for batches of {batch}, a number that its code contains" if batch > 1 else ""
        return (
            f"{subject} class {class_of(self._traced)} for these weights is in the file beside it{batch_note}.",
            *([state] if omitted else []),
        )

    @property
    def observable(self) -> frozenset[str]:
        """The outputs of weighted layers, except values inside a layer that is a single node of the program."""
        return outputs_of_weighted_layers(self.graph) & {node.name for node in self._traced.module.graph.nodes}

    @property
    def class_name(self) -> str:
        """The class of the traced module; empty for an exported program."""
        return "" if self._is_program else class_of(self._traced)

    def companion_files(self, target: Path) -> tuple[Path, ...]:
        """The file of the generated class; none for an exported program."""
        return () if self._is_program else (companion_file(target),)

    @cached_property
    def coupled_tensors(self) -> Mapping[str, str]:
        """Second names of shared weights, and optimizer slots, each with the weight that it is cut like."""
        owners = {**self._traced.aliases, **self._slots.owners}
        return {name: self._traced.aliases.get(owner, owner) for name, owner in owners.items()}

    @cached_property
    def _slots(self) -> OptimizerSlots:
        if self._is_program or self._traced.holds_module or self._model.family is Family.SAFETENSORS:
            return OptimizerSlots()
        shapes = {tensor.name: tensor.shape for tensor in self._model.tensors}
        if not any(".state." in f".{name}" for name in shapes):
            # Without optimizer state there is no need to load the checkpoint here; it is loaded when it is written.
            return OptimizerSlots()
        return optimizer_slots(load_checkpoint(self._model, self._traced), parameter_order(self._traced), shapes)

    @property
    def _is_program(self) -> bool:
        return self._model.family is Family.TORCH_PROGRAM

    def prune(self, removed: RemovedIndices, after: PrunedShapes, weights: Mapping[str, Array]) -> PrunedProgram:
        changes = WeightChanges(removed_by_tensor(removed), weights)
        program = prune_program(self._traced, changes.axes, after, self.with_weights(weights).values)
        return PrunedProgram(program.module, program.values, changes=changes)

    def with_weights(self, weights: Mapping[str, Array]) -> WeightedProgram:
        values = {}
        for name, tensor in self._traced.names.items():
            array = weights.get(self._traced.aliases.get(tensor, tensor))
            if array is not None:
                values[name] = view_as_torch(array).to(attribute(self._traced.module, name).dtype)
        return WeightedProgram(self._traced.module, values)

    def random_inputs(self, random: np.random.Generator) -> Feeds:
        """Random inputs of the shapes and types that the network was traced on, with a batch of 1 if it takes that."""
        generator = torch.Generator().manual_seed(int(random.integers(1 << 62)))
        used = zip(self.graph.inputs, self._traced.single_inputs, strict=True)
        return {name: to_numpy(random_like(example, generator)) for name, example in used}

    def runner(self, program: WeightedProgram, observed: Iterable[str], *, in_float64: bool = False) -> Runner:
        """A runner that interprets the program node by node."""
        names = tuple(observed)
        program = replace(program, in_float64=in_float64)

        def run(feeds: Feeds) -> list[Any]:
            recorded: dict[str, torch.Tensor] = {}

            def record(name: str, value: Any) -> None:
                if name in names:
                    # Cloned, as a later operation may change the value in place.
                    recorded[name] = value.clone()

            inputs = [to_torch(feeds[name]) for name in self.graph.inputs]
            if in_float64:
                inputs = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs]
            outputs = run_program(program, inputs, record)
            return [to_numpy(tensor) for tensor in (*outputs, *(recorded[name] for name in names))]

        return run

    def write(self, network: PrunedProgram, folder: Path, target: Path) -> WrittenNetwork:
        """Write an exported program as such; other networks as weights, with a generated class beside them."""
        if self._traced.program is not None:
            path = folder / target.name
            return WrittenNetwork(path, write_program(self._traced, self._traced.program, network, path))
        axes, new_values = network.changes.axes, network.changes.new_values
        axes = {**axes, **{name: axes[owner] for name, owner in self.coupled_tensors.items() if owner in axes}}
        new_values = {
            **new_values,
            **{name: new_values[owner] for name, owner in self._traced.aliases.items() if owner in new_values},
        }
        change = WeightChanges(axes, new_values, self._slots.unmatched)
        return WrittenNetwork(write_weights(self._model, self._traced, network, change, folder, target=target))


_UNBOUNDED = 1 << 62
"""From this upper bound on, a dynamic axis counts as unbounded."""


def prune_program(
    traced: TracedModel, axes: Mapping[str, Axes], after: PrunedShapes, replaced: Mapping[str, torch.Tensor]
) -> WeightedProgram:
    """The smaller program; its weights are slices of the original weights, or of the values that replace them."""
    values = dict(replaced)
    for name, tensor in traced.names.items():
        removed = axes.get(traced.aliases.get(tensor, tensor))
        if removed is not None:
            values[name] = delete_tensor_indices(values.get(name, attribute(traced.module, name)), removed)
    with quiet():
        graph = copy.deepcopy(traced.module.graph)
        resize(graph, after)
        graph.lint()
        return WeightedProgram(torch.fx.GraphModule(traced.module, graph), values)


def write_program(
    traced: TracedModel, original: ExportedProgram, pruned: WeightedProgram, path: Path
) -> tuple[str, ...]:
    """Export the smaller program again, so that every shape in it is right, write it, and return notes."""
    with quiet(), temporary_folder() as scratch:
        # Through a symbolic link, as PyTorch aborts if the name of a folder is not UTF-8.
        (scratch / "target").symlink_to(path.parent.absolute(), target_is_directory=True)
        try:
            program, notes = _export_again(original, traced.examples, with_weights(traced, pruned))
            torch.export.save(program, scratch / "target" / path.name)
        except Exception as error:
            raise WorkError(
                f"PyTorch cannot export the pruned program: {first_line(error)}; nothing was written"
            ) from error
    return notes


def _export_again(
    original: ExportedProgram, examples: Examples, module: torch.nn.Module
) -> tuple[ExportedProgram, tuple[str, ...]]:
    """Export with the original bounds of dynamic axes; if that fails, with bounds that PyTorch chooses, and a note."""
    bounds = {
        str(symbol): Dim(f"length_{number}", min=int(limits.lower), max=_upper_limit(limits.upper))
        for number, (symbol, limits) in enumerate(original.range_constraints.items())
    }
    try:
        axes = _open_axes(original, bounds)
        return torch.export.export(module, examples, dynamic_shapes=axes, strict=False), ()
    except Exception as error:
        if not bounds:
            raise
        axes = _open_axes(original, {})
        exported = torch.export.export(module, examples, dynamic_shapes=axes, strict=False)
        reason = first_line(error)
        return exported, (f"PyTorch chose new bounds for the dynamic sizes of the program: {reason}.",)


def with_weights(traced: TracedModel, weighted: WeightedProgram) -> torch.fx.GraphModule:
    """A module with the pruned weights, including weights that no operation reads."""
    memo: dict[int, Any] = {}
    for name, weight in (*traced.module.named_parameters(), *traced.module.named_buffers()):
        value = weighted.values.get(name, weight)
        is_trained = isinstance(weight, torch.nn.Parameter)
        memo[id(weight)] = torch.nn.Parameter(value, requires_grad=weight.requires_grad) if is_trained else value
    module = copy.deepcopy(traced.module, memo)
    module.graph = copy.deepcopy(weighted.module.graph)
    return module


def _open_axes(program: ExportedProgram, bounds: Mapping[str, Any]) -> tuple[dict[int, Any] | None, ...]:
    """For each input the dynamic axes with their bounds, or None if it has none."""
    names = set(program.graph_signature.user_inputs)
    axes = []
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in names:
            shape = getattr(node.meta.get("val"), "shape", ())
            lengths = {axis: length for axis, length in enumerate(shape) if not isinstance(length, int)}
            axes.append({axis: bounds.get(str(length), Dim.AUTO) for axis, length in lengths.items()})
    return tuple(bounds_of_axes or None for bounds_of_axes in axes)


def _upper_limit(limit: Any) -> int | None:
    return int(limit) if str(limit).isdecimal() and int(limit) < _UNBOUNDED else None


def graph_of(model: ModelFile, traced: TracedModel) -> ChannelGraph:
    """The channel graph of a program; weights have the names that they have in the file."""
    weights = _read_weights(model, traced)
    nodes = list(traced.module.graph.nodes)
    try:
        recorded_shapes = traced.shapes or shapes_of(WeightedProgram(traced.module), traced.single_inputs)
    except Exception as error:
        raise InputError(f"PyTorch cannot run {model.path}: {first_line(error)}") from error
    # A copy, as `lower` adds the shapes of intermediate values.
    shapes = dict(recorded_shapes)
    names = {name: traced.aliases.get(tensor, tensor) for name, tensor in traced.names.items()}
    weight_views = views(nodes, {name: tensor for name, tensor in names.items() if tensor in weights}, shapes)
    # Counted here, as `lower` adds views of weights.
    use_counts = uses(nodes, weight_views)
    operations: list[OpNode] = []
    for node in nodes:
        is_operation = node.op == "call_function" and node.name not in weight_views and not is_item(node)
        if is_operation and _has_shape(node, shapes):
            operations += lower(OpContext(node, shapes, weight_views))
    return ChannelGraph(
        nodes=tuple(operations),
        weights=weights,
        views=weight_views,
        uses=use_counts,
        shapes=shapes,
        inputs=tuple(node.name for node in nodes if node.op == "placeholder" and node.name in shapes),
        outputs=tuple(dict.fromkeys(value.name for value in nodes[-1].all_input_nodes if value.name in shapes)),
    )


def _has_shape(node: torch.fx.Node, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether an output of a node is a tensor with a known shape, not only a number."""
    return node.name in shapes or any(is_item(user) and user.name in shapes for user in node.users)


def _read_weights(model: ModelFile, traced: TracedModel) -> dict[str, Array]:
    tensors = {tensor.name: tensor for tensor in model.tensors}
    return {
        name: model.read(tensors[name])
        for name in dict.fromkeys(traced.names.values())
        if tensors[name].is_float and tensors[name].shape and name not in traced.aliases
    }
