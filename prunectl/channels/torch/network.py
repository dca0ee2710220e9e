"""A network of PyTorch that can be cut: a program that torch.export made of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prunectl.channels.after import After
from prunectl.channels.graph import Graph
from prunectl.channels.lengths import Shapes
from prunectl.channels.source import Feeds, Removed, Runner, axes_of, made_by_weights
from prunectl.channels.torch.checkpoint import Change, Kept, kept_of
from prunectl.channels.torch.cut import attribute, cut
from prunectl.channels.torch.inputs import random_like
from prunectl.channels.torch.opening import Opened, opened
from prunectl.channels.torch.program import write_program
from prunectl.channels.torch.read import graph_of
from prunectl.channels.torch.run import Network, outcome
from prunectl.channels.torch.weights import beside, class_of, load, parameters, write_weights
from prunectl.errors import UsageError
from prunectl.formats.base import Array, ModelFile
from prunectl.training.network import Origin
from prunectl.training.torch.arrays import to_numpy, to_torch


def read(model: ModelFile, origin: Origin, data: Shapes | None = None) -> TorchSource:
    """Return the network of a file of PyTorch, with what builds it where the file holds weights alone.

    It is traced on the shapes that were typed, whatever data there is.
    """
    del data
    if origin.custom_objects:
        raise UsageError("--custom-objects explains layers of Keras", hint="leave out --custom-objects")
    return TorchSource(model, opened(model, origin))


class TorchSource:
    """A network of PyTorch, as cutting sees it."""

    def __init__(self, model: ModelFile, found: Opened) -> None:
        self._model = model
        self._opened = found
        self._graph = graph_of(model, found)
        self._change = Change({}, {})
        self._written_notes: tuple[str, ...] = ()

    @property
    def graph(self) -> Graph:
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
        return () if self._is_program else (beside(target),)

    @cached_property
    def followers(self) -> Mapping[str, str]:
        """Second names of shared weights, and what optimizers keep of each."""
        found = {**self._opened.aliases, **self._kept.owners}
        return {name: self._opened.aliases.get(of, of) for name, of in found.items()}

    @cached_property
    def _kept(self) -> Kept:
        if self._is_program or self._opened.holds_module or self._model.format == "safetensors":
            return Kept()
        shapes = {tensor.name: tensor.shape for tensor in self._model.tensors}
        return kept_of(load(self._model, self._opened), parameters(self._opened), shapes)

    @property
    def _is_program(self) -> bool:
        return self._model.format == "torch-export"

    def cut(self, removed: Removed, after: After, weights: Mapping[str, Array]) -> Network:
        """Return the smaller program."""
        self._change = Change(axes_of(removed), weights)
        return cut(self._opened, self._change.axes, after, self.with_weights(weights).values)

    def with_weights(self, weights: Mapping[str, Array]) -> Network:
        """Return the program, some of its numbers replaced."""
        values = {}
        for name, of in self._opened.names.items():
            found = weights.get(self._opened.aliases.get(of, of))
            if found is not None:
                values[name] = to_torch(found).to(attribute(self._opened.module, name).dtype)
        return Network(self._opened.module, values)

    def feeds(self, random: np.random.Generator) -> Feeds:
        """Return random inputs."""
        generator = torch.Generator().manual_seed(int(random.integers(1 << 62)))
        used = zip(self.graph.inputs, self._opened.light, strict=True)
        return {name: to_numpy(random_like(example, generator)) for name, example in used}

    @property
    def has_float64(self) -> bool:
        """Always: every step of a program takes it."""
        return True

    def runner(self, network: Network, shown: Iterable[str], *, is_wide: bool = False) -> Runner:
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
            found = outcome(network, inputs, see)
            return [to_numpy(one) for one in (*found, *(seen[name] for name in names))]

        return run

    def write(self, network: Network, folder: Path, target: Path) -> Path:
        """Write a program as a program, all else as weights with a class beside them that takes them."""
        if self._is_program:
            self._written_notes = write_program(self._opened, network, folder / target.name)
            return folder / target.name
        axes, numbers = self._change.axes, self._change.numbers
        axes = {**axes, **{name: axes[of] for name, of in self.followers.items() if of in axes}}
        numbers = {**numbers, **{name: numbers[of] for name, of in self._opened.aliases.items() if of in numbers}}
        change = Change(axes, numbers, self._kept.unmatched)
        return write_weights(self._model, self._opened, network, change, folder, target=target)
