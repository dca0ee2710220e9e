"""The graph under construction, and the context of a layer call, through which the rules of layers emit operations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from prunectl.channels.graph import ChannelGraph, OpKind, OpNode, Shape, WeightView
from prunectl.channels.keras.weights import ConfigPath
from prunectl.formats.base import Array, ModelFile, Tensor
from prunectl.formats.keras.flops import matmuls
from prunectl.formats.keras.flops.shapes import LayerCall, UnknownShapeError


@dataclass(frozen=True, slots=True)
class CalledLayer:
    """A call of a layer, with its inputs and outputs."""

    path: ConfigPath
    names: tuple[str, ...]
    """The names of the models around the layer, and its own name."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ObservedValue:
    """A value that can be recorded in Keras, as a layer passes it to its activation."""

    names: tuple[str, ...]
    """The names of the models around the layer, and its own name."""
    order: tuple[int, ...]
    """The permutation from the axes of the value in Keras to its axes in the graph."""


class GraphBuilder:
    """A graph under construction."""

    def __init__(self, model: ModelFile) -> None:
        self._model = model
        self.nodes: list[OpNode] = []
        self.shapes: dict[str, Shape] = {}
        self.views: dict[str, WeightView] = {}
        self.uses: Counter[str] = Counter()
        self.inputs: dict[str, str] = {}
        """The dtype of each input, by name."""
        self.called: list[CalledLayer] = []
        self.observed: dict[str, ObservedValue] = {}
        """The values that layers compute just before their activations, by name."""
        self.references: dict[tuple[ConfigPath, str, int, int], str] = {}
        """Values by the references of a model: its path, a layer, the number of a call, the number of an output."""
        self._weights: dict[str, Tensor] = {}
        self._names: set[str] = set()

    def fresh(self, name: str, shape: Shape | None) -> str:
        """The name of a new value."""
        number = 1
        while (unique := name if number == 1 else f"{name}:{number}") in self._names:
            number += 1
        self._names.add(unique)
        if shape is not None:
            self.shapes[unique] = shape
        return unique

    def rename_output(self, value: str, name: str, start: int) -> str:
        """Name a value after the layer if an operation from `start` on computes it, and return its name."""
        outputs = {output for node in self.nodes[start:] for output in node.outputs}
        if value not in outputs:
            return value
        new_name = self.fresh(name, self.shapes.pop(value, None))
        self.nodes[start:] = [
            replace(
                node,
                inputs=_with_renamed(node.inputs, value, new_name),
                outputs=_with_renamed(node.outputs, value, new_name),
            )
            for node in self.nodes[start:]
        ]
        if value in self.observed:
            self.observed[new_name] = self.observed.pop(value)
        return new_name

    def add(
        self,
        name: str,
        op: str,
        kind: OpKind,
        inputs: Sequence[str],
        shapes: Sequence[Shape | None],
        **attributes: Any,
    ) -> tuple[str, ...]:
        """Emit an operation, and return the names of its outputs."""
        outputs = tuple(self.fresh(f"{name}~{len(self.nodes)}", shape) for shape in shapes)
        for value in inputs:
            if value in self.views:
                self.uses[self.views[value].tensor] += 1
        self.nodes.append(OpNode(name, op, kind, tuple(inputs), outputs, attributes))
        return outputs

    def view(self, tensor: Tensor, axes: Sequence[int | None]) -> str:
        """The name of a view of a weight with its axes permuted; None adds an axis of length 1."""
        order = tuple(axes)
        name = tensor.name if order == tuple(range(len(tensor.shape))) else f"{tensor.name} as {order}"
        self._weights[tensor.name] = tensor
        self.views[name] = WeightView(tensor.name, order)
        self.shapes[name] = tuple(1 if axis is None else tensor.shape[axis] for axis in order)
        return name

    @contextmanager
    def rollback(self) -> Generator[None]:
        """Remove the operations that were emitted if an exception is raised."""
        nodes, uses = len(self.nodes), self.uses.copy()
        try:
            yield
        except Exception:
            del self.nodes[nodes:]
            self.uses = uses
            raise

    @property
    def observable(self) -> dict[str, ObservedValue]:
        """The values that can be recorded, of layers that are called only once, as calls cannot be told apart."""
        outputs = {output for node in self.nodes for output in node.outputs}
        observed_times = Counter(value.names for name, value in self.observed.items() if name in outputs)
        call_times = Counter(layer_call.names for layer_call in self.called)
        return {
            name: value
            for name, value in self.observed.items()
            if name in outputs and observed_times[value.names] == call_times[value.names] == 1
        }

    def graph(self, outputs: Sequence[str]) -> ChannelGraph:
        """The finished graph."""
        return ChannelGraph(
            nodes=tuple(self.nodes),
            # Copied, as each view would keep the file open.
            weights=LazyWeights(self._weights, lambda name: np.array(self._model.read(self._weights[name]))),
            views=self.views,
            uses=self.uses,
            shapes=self.shapes,
            inputs=tuple(self.inputs),
            outputs=tuple(dict.fromkeys(outputs)),
        )


class LazyWeights(Mapping[str, Array]):
    """Weights that are read on first access."""

    def __init__(self, names: Collection[str], read: Callable[[str], Array]) -> None:
        self._names, self._read = names, read
        self._arrays: dict[str, Array] = {}

    def __getitem__(self, name: str) -> Array:
        if name not in self._arrays:
            self._arrays[name] = self._read(name)
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _with_renamed(names: tuple[str, ...], old: str, new: str) -> tuple[str, ...]:
    return tuple(new if name == old else name for name in names)


@dataclass(frozen=True, slots=True)
class LayerContext:
    """A call of a layer, for its rule; UnknownShapeError if the rule needs a fact that is not known."""

    builder: GraphBuilder
    names: tuple[str, ...]
    """The names of the models around the layer, and its own name."""
    layer: LayerCall
    inputs: tuple[str, ...]
    """The input values, first the positional ones, then the keyword arguments."""
    weights: Mapping[str, Tensor]
    keywords: tuple[str, ...] = ()
    """The names of the keyword arguments, which are the last inputs."""

    @property
    def name(self) -> str:
        """The name of the layer, prefixed with those of the models around it."""
        return "/".join(self.names)

    @property
    def op(self) -> str:
        """The class of the layer."""
        return self.layer.kind

    @property
    def data(self) -> str:
        """The only input; UnknownShapeError if there are several."""
        if len(self.inputs) != 1:
            raise UnknownShapeError
        return self.inputs[0]

    def shape(self, value: str) -> Shape:
        """The shape of a value, with the batch axis."""
        if value not in self.builder.shapes:
            raise UnknownShapeError
        return self.builder.shapes[value]

    @property
    def batch(self) -> int:
        """The batch size of the inputs: more than 1 inside TimeDistributed, where steps are put on the batch axis."""
        return self.shape(self.inputs[0])[0]

    def output_shape(self) -> Shape:
        """The output shape, with the batch axis."""
        return with_batch(matmuls.output(self.layer), self.batch)

    def emit(self, kind: OpKind, inputs: Sequence[str], shape: Shape, **attributes: Any) -> str:
        """Emit an operation with one output."""
        if any(length == 0 for length in shape):
            raise UnknownShapeError
        return self.builder.add(self.name, self.op, kind, inputs, (shape,), **attributes)[0]

    def weight_view(self, leaf: str, axes: Sequence[int | None]) -> str:
        """The name of a view of a weight with its axes permuted; empty if the layer has no weight of this name."""
        tensor = self.weights.get(leaf)
        return "" if tensor is None else self.builder.view(tensor, axes)

    def transpose(self, value: str, order: Sequence[int]) -> str:
        """Permute the axes of a value."""
        if list(order) == list(range(len(order))):
            return value
        shape = self.shape(value)
        return self.emit(OpKind.TRANSPOSE, (value,), tuple(shape[axis] for axis in order), order=tuple(order))

    def to_channels_first(self, value: str) -> str:
        """Move the channels of a value to axis 1, unless the layer has them there."""
        rank = len(self.shape(value))
        return value if self.layer.is_channels_first else self.transpose(value, (0, rank - 1, *range(1, rank - 1)))

    def from_channels_first(self, value: str) -> str:
        """Move the channels of a value from axis 1 to the axis of the layer's data format."""
        rank = len(self.shape(value))
        return value if self.layer.is_channels_first else self.transpose(value, (0, *range(2, rank), 1))

    def channels_first_shape(self, shape: Shape) -> Shape:
        """A shape in the layer's data format, with the channels moved to axis 1."""
        return shape if self.layer.is_channels_first else (shape[0], shape[-1], *shape[1:-1])


def with_batch(shape: Sequence[int | None] | None, batch: int) -> Shape:
    """A shape with a batch axis added in front; UnknownShapeError if a length is not known."""
    lengths = [] if shape is None else [length for length in shape if length is not None]
    if shape is None or len(lengths) != len(shape):
        raise UnknownShapeError
    return (batch, *lengths)
