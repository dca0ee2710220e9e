"""A network of PyTorch that can be cut: a program that torch.export made of it."""

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

from prunectl.channels.adapter import Feeds, PrunedShapes, RemovedIndices, Runner, axes_of, made_by_weights
from prunectl.channels.graph import ChannelGraph, OpNode
from prunectl.channels.lengths import Shapes
from prunectl.channels.torch.checkpoint import (
    KeptSlots,
    WeightChanges,
    class_of,
    companion_files,
    load,
    optimizer_slots,
    parameters,
    write_weights,
)
from prunectl.channels.torch.export import TracedModel, trace_model
from prunectl.channels.torch.fx import OpContext, WeightedProgram, is_item, shapes_of, uses, views
from prunectl.channels.torch.fx import run as run_run
from prunectl.channels.torch.ops import lower
from prunectl.channels.torch.resize import attribute, prune_program
from prunectl.channels.torch.tracing import quiet, random_like
from prunectl.errors import UsageError, WorkError, first_line
from prunectl.formats.base import Array, ModelFile
from prunectl.training.backend import ModelOrigin
from prunectl.training.torch.tensors import to_numpy, to_torch

_ENDLESS = 1 << 62


def write_program(found: TracedModel, network: WeightedProgram, path: Path) -> tuple[str, ...]:
    """Trace a smaller program anew, so that every shape in it is right, write it, and return what has to be said."""
    with quiet():
        try:
            program, notes = _traced(found, with_weights(found, network))
            torch.export.save(program, path)
        except Exception as error:
            raise WorkError(f"the cut program cannot be exported: {first_line(error)}; nothing was written") from error
    return notes


def _traced(found: TracedModel, module: torch.nn.Module) -> tuple[ExportedProgram, tuple[str, ...]]:
    """Return a program with the bounds of the one that was read, or with those that its steps ask for."""
    bounds = _bounds(found)
    try:
        axes = _open_axes(found, bounds)
        return torch.export.export(module, found.examples, dynamic_shapes=axes, strict=False), ()
    except Exception as error:
        if not bounds:
            raise
        axes = _open_axes(found, {})
        program = torch.export.export(module, found.examples, dynamic_shapes=axes, strict=False)
        reason = first_line(error)
        return program, (f"The bounds of the program's sizes are not those of the file, but PyTorch's own: {reason}.",)


def with_weights(found: TracedModel, network: WeightedProgram) -> torch.fx.GraphModule:
    """Return a module with the smaller weights in it, those that nothing reads included."""
    memo: dict[int, Any] = {}
    for name, weight in (*found.module.named_parameters(), *found.module.named_buffers()):
        value = network.values.get(name, weight)
        is_trained = isinstance(weight, torch.nn.Parameter)
        memo[id(weight)] = torch.nn.Parameter(value, requires_grad=weight.requires_grad) if is_trained else value
    module = copy.deepcopy(found.module, memo)
    module.graph = copy.deepcopy(network.module.graph)
    return module


def _open_axes(found: TracedModel, bounds: Mapping[str, Any]) -> tuple[dict[int, Any] | None, ...]:
    """Return the axes that may have any length."""
    names = set(found.program.graph_signature.user_inputs)
    axes = []
    for node in found.program.graph.nodes:
        if node.op == "placeholder" and node.name in names:
            shape = getattr(node.meta.get("val"), "shape", ())
            open_axes = {at: length for at, length in enumerate(shape) if not isinstance(length, int)}
            axes.append({at: bounds.get(str(length), Dim.AUTO) for at, length in open_axes.items()})
    return tuple(one or None for one in axes)


def _bounds(found: TracedModel) -> dict[str, Any]:
    """Return an axis for each length that the program gives a name and limits."""
    return {
        str(symbol): Dim(f"length_{at}", min=int(limits.lower), max=_most(limits.upper))
        for at, (symbol, limits) in enumerate(found.program.range_constraints.items())
    }


def _most(limit: Any) -> int | None:
    return int(limit) if str(limit).isdecimal() and int(limit) < _ENDLESS else None


def graph_of(model: ModelFile, found: TracedModel) -> ChannelGraph:
    """Return the operations of a program by what they do to channels; weights are called what the file calls them."""
    weights = _weights(model, found)
    nodes = list(found.module.graph.nodes)
    shapes = shapes_of(WeightedProgram(found.module), found.light)
    names = {name: found.aliases.get(of, of) for name, of in found.names.items()}
    seen = views(nodes, {name: of for name, of in names.items() if of in weights}, shapes)
    # A copy: what several steps see of a weight is added on the way.
    counted = uses(nodes, dict(seen))
    made: list[OpNode] = []
    for node in nodes:
        is_operation = node.op == "call_function" and node.name not in seen and not is_item(node)
        if is_operation and _says_numbers(node, shapes):
            made += lower(OpContext(node, shapes, seen))
    return ChannelGraph(
        nodes=tuple(made),
        weights=weights,
        views=seen,
        uses=counted,
        shapes=shapes,
        inputs=tuple(node.name for node in nodes if node.op == "placeholder" and node.name in shapes),
        outputs=tuple(dict.fromkeys(one.name for one in nodes[-1].all_input_nodes if one.name in shapes)),
    )


def _says_numbers(node: torch.fx.Node, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether values come out of it, and not a length alone."""
    return node.name in shapes or any(is_item(user) and user.name in shapes for user in node.users)


def _weights(model: ModelFile, found: TracedModel) -> dict[str, Array]:
    held = {tensor.name: tensor for tensor in model.tensors}
    return {
        name: model.read(held[name])
        for name in dict.fromkeys(found.names.values())
        if held[name].is_float and held[name].shape and name not in found.aliases
    }


def read_torch(model: ModelFile, origin: ModelOrigin, data: Shapes | None = None) -> TorchSource:
    """Return the network of a file of PyTorch, with what builds it where the file holds weights alone.

    It is traced on the shapes that were typed, whatever data there is.
    """
    del data
    if origin.custom_objects:
        raise UsageError("--custom-objects explains layers of Keras", hint="leave out --custom-objects")
    return TorchSource(model, trace_model(model, origin))


class TorchSource:
    """A network of PyTorch, as cutting sees it."""

    def __init__(self, model: ModelFile, found: TracedModel) -> None:
        self._model = model
        self._opened = found
        self._graph = graph_of(model, found)
        self._change = WeightChanges({}, {})
        self._written_notes: tuple[str, ...] = ()

    @property
    def graph(self) -> ChannelGraph:
        """What can be followed; weights are called what the file calls them."""
        return self._graph

    @property
    def copies(self) -> Mapping[str, str]:
        """Nothing: every weight in the graph is one of the file."""
        return {}

    @property
    def dropped(self) -> frozenset[str]:
        """The states of optimizers that cannot be cut as their weights are."""
        places = tuple(f"{name}.state." if name else "state." for name in self._kept.unmatched)
        return frozenset(tensor.name for tensor in self._model.tensors if tensor.name.startswith(places))

    @property
    def notes(self) -> tuple[str, ...]:
        """What is written in place of a module."""
        if self._is_program:
            return self._written_notes
        lost = ", ".join(name or "the file" for name in self._kept.unmatched)
        state = f"The state of {lost} was left out: which weights it belongs to cannot be told."
        held = "The file holds weights alone now; the" if self._opened.holds_module else "The"
        batch = len(self._opened.light[0])
        more = f", for {batch} at a time, as its steps name this number" if batch > 1 else ""
        return (
            f"{held} class {class_of(self._opened)} that takes them is beside it{more}.",
            *([state] if lost else []),
        )

    @property
    def doubts(self) -> tuple[str, ...]:
        """Nothing: what does not fit is refused."""
        return ()

    @property
    def showable(self) -> frozenset[str]:
        """What every convolution and every dense layer makes; layers of several steps are one step of the program."""
        return made_by_weights(self.graph) & {node.name for node in self._opened.module.graph.nodes}

    def beside(self, target: Path) -> tuple[Path, ...]:
        """Return where the class goes."""
        return () if self._is_program else (companion_files(target),)

    @cached_property
    def followers(self) -> Mapping[str, str]:
        """Second names of shared weights, and what optimizers keep of each."""
        found = {**self._opened.aliases, **self._kept.owners}
        return {name: self._opened.aliases.get(of, of) for name, of in found.items()}

    @cached_property
    def _kept(self) -> KeptSlots:
        if self._is_program or self._opened.holds_module or self._model.format == "safetensors":
            return KeptSlots()
        shapes = {tensor.name: tensor.shape for tensor in self._model.tensors}
        return optimizer_slots(load(self._model, self._opened), parameters(self._opened), shapes)

    @property
    def _is_program(self) -> bool:
        return self._model.format == "torch-export"

    def cut(self, removed: RemovedIndices, after: PrunedShapes, weights: Mapping[str, Array]) -> WeightedProgram:
        """Return the smaller program."""
        self._change = WeightChanges(axes_of(removed), weights)
        return prune_program(self._opened, self._change.axes, after, self.with_weights(weights).values)

    def with_weights(self, weights: Mapping[str, Array]) -> WeightedProgram:
        """Return the program, some of its numbers replaced."""
        values = {}
        for name, of in self._opened.names.items():
            found = weights.get(self._opened.aliases.get(of, of))
            if found is not None:
                values[name] = to_torch(found).to(attribute(self._opened.module, name).dtype)
        return WeightedProgram(self._opened.module, values)

    def feeds(self, random: np.random.Generator) -> Feeds:
        """Return random inputs."""
        generator = torch.Generator().manual_seed(int(random.integers(1 << 62)))
        used = zip(self.graph.inputs, self._opened.light, strict=True)
        return {name: to_numpy(random_like(example, generator)) for name, example in used}

    @property
    def has_float64(self) -> bool:
        """Always: every step of a program takes it."""
        return True

    def runner(self, network: WeightedProgram, shown: Iterable[str], *, is_wide: bool = False) -> Runner:
        """Return what PyTorch makes of a program, step by step."""
        names = tuple(shown)
        network = replace(network, is_wide=is_wide)

        def run(feeds: Feeds) -> list[Any]:
            seen: dict[str, torch.Tensor] = {}

            def see(name: str, value: Any) -> None:
                if name in names:
                    # A later step may work in place.
                    seen[name] = value.clone()

            inputs = [to_torch(feeds[name]) for name in self.graph.inputs]
            if is_wide:
                inputs = [one.double() if one.is_floating_point() else one for one in inputs]
            found = run_run(network, inputs, see)
            return [to_numpy(one) for one in (*found, *(seen[name] for name in names))]

        return run

    def write(self, network: WeightedProgram, folder: Path, target: Path) -> Path:
        """Write a program as a program, all else as weights with a class beside them that takes them."""
        if self._is_program:
            self._written_notes = write_program(self._opened, network, folder / target.name)
            return folder / target.name
        axes, numbers = self._change.axes, self._change.numbers
        axes = {**axes, **{name: axes[of] for name, of in self.followers.items() if of in axes}}
        numbers = {**numbers, **{name: numbers[of] for name, of in self._opened.aliases.items() if of in numbers}}
        change = WeightChanges(axes, numbers, self._kept.unmatched)
        return write_weights(self._model, self._opened, network, change, folder, target=target)
