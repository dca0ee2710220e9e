"""A graph that grows operation by operation, as a Keras configuration is followed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from prunectl.channels.graph import Graph, Kind, Node, View
from prunectl.channels.keras.spots import Spot
from prunectl.formats.base import Array, ModelFile, Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Met:
    """A layer that was called: what went in and what came out."""

    spot: Spot
    names: tuple[str, ...]
    """Of the models around it, and its own."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    leaves: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Look:
    """Where Keras has a value: a layer hands it to its activation."""

    names: tuple[str, ...]
    """Of the models around the layer, and its own."""
    order: tuple[int, ...]
    """The order in which the axes that Keras has are those of the graph."""


class Net:
    """Operations, values and weights so far."""

    def __init__(self, model: ModelFile) -> None:
        self._model = model
        self.nodes: list[Node] = []
        self.shapes: dict[str, Shape] = {}
        self.views: dict[str, View] = {}
        self.uses: Counter[str] = Counter()
        self.inputs: dict[str, str] = {}
        """Types of numbers by the names of inputs."""
        self.met: list[Met] = []
        self.looks: dict[str, Look] = {}
        """Of values that some layer makes just before its activation."""
        self.said: dict[tuple[Spot, str, int, int], str] = {}
        """Values by how a model refers to them: a layer, the number of a call, the number of an output."""
        self._weights: dict[str, Tensor] = {}
        self._names: set[str] = set()

    def fresh(self, name: str, shape: Shape | None) -> str:
        """Return the name of a new value."""
        number = 1
        while (own := name if number == 1 else f"{name}:{number}") in self._names:
            number += 1
        self._names.add(own)
        if shape is not None:
            self.shapes[own] = shape
        return own

    def renamed(self, value: str, name: str, since: int) -> str:
        """Give what the operations since some place come to the name of the layer, and return it."""
        made = {output for node in self.nodes[since:] for output in node.outputs}
        if value not in made:
            return value
        own = self.fresh(name, self.shapes.pop(value, None))
        self.nodes[since:] = [
            replace(node, inputs=_replaced(node.inputs, value, own), outputs=_replaced(node.outputs, value, own))
            for node in self.nodes[since:]
        ]
        if value in self.looks:
            self.looks[own] = self.looks.pop(value)
        return own

    def add(
        self,
        name: str,
        op: str,
        kind: Kind,
        inputs: Sequence[str],
        shapes: Sequence[Shape | None],
        **attributes: Any,
    ) -> tuple[str, ...]:
        """Put an operation in, and return the names of its outputs."""
        outputs = tuple(self.fresh(f"{name}~{len(self.nodes)}", shape) for shape in shapes)
        for value in inputs:
            if value in self.views:
                self.uses[self.views[value].tensor] += 1
        self.nodes.append(Node(name, op, kind, tuple(inputs), outputs, attributes))
        return outputs

    def view(self, tensor: Tensor, axes: Sequence[int | None]) -> str:
        """Return the value that a weight is, its axes in another order; axes of length 1 may be put in."""
        order = tuple(axes)
        name = tensor.name if order == tuple(range(len(tensor.shape))) else f"{tensor.name} as {order}"
        self._weights[tensor.name] = tensor
        self.views[name] = View(tensor.name, order)
        self.shapes[name] = tuple(1 if axis is None else tensor.shape[axis] for axis in order)
        return name

    @contextmanager
    def undone_on_failure(self) -> Generator[None]:
        """Take back what was put in, if something is not known."""
        nodes, uses = len(self.nodes), self.uses.copy()
        try:
            yield
        except Exception:
            del self.nodes[nodes:]
            self.uses = uses
            raise

    @property
    def showable(self) -> dict[str, Look]:
        """What can be looked at while it runs; of a layer that is called twice, nobody knows which is which."""
        made = {output for node in self.nodes for output in node.outputs}
        times = Counter(look.names for name, look in self.looks.items() if name in made)
        called = Counter(met.names for met in self.met)
        return {
            name: look
            for name, look in self.looks.items()
            if name in made and times[look.names] == called[look.names] == 1
        }

    def graph(self, outputs: Sequence[str]) -> Graph:
        """Return what has grown."""
        return Graph(
            nodes=tuple(self.nodes),
            weights=_Read(self._model, self._weights),
            views=self.views,
            uses=self.uses,
            shapes=self.shapes,
            inputs=tuple(self.inputs),
            outputs=tuple(dict.fromkeys(outputs)),
        )


class _Read(Mapping[str, Array]):
    """Weights, read when they are first looked at."""

    def __init__(self, model: ModelFile, tensors: Mapping[str, Tensor]) -> None:
        self._model, self._tensors = model, tensors
        self._held: dict[str, Array] = {}

    def __getitem__(self, name: str) -> Array:
        if name not in self._held:
            # A copy: each view of the file would keep it open once more.
            self._held[name] = np.array(self._model.read(self._tensors[name]))
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _replaced(names: tuple[str, ...], old: str, new: str) -> tuple[str, ...]:
    return tuple(new if name == old else name for name in names)
