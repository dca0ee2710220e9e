"""The weights of an ONNX model that can be changed, and the nodes that use each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from prunectl.formats.base import Array, ModelFile, Tensor
from prunectl.formats.onnx.usage import CELLS
from prunectl.graphs.onnx.network import (
    GraphTensor,
    OnnxNetwork,
    all_tensors,
    load_message,
    refer,
    set_tensor_data,
    stands_outside,
)
from prunectl.graphs.onnx.nodes import axes_behind, output_of

_LISTED_BEFORE = 4
"""Version of the format before which a tensor had to be listed among the inputs."""
_TENSOR = 4
_STATES = "prunectl/states_"


class LoadedWeights:
    """A model whose tensors can be changed; what was not stays in the file.

    In its message every tensor is dense, and each of the main graph an initializer, large ones outside.
    """

    def __init__(self, model: ModelFile) -> None:
        self.model = model
        self.proto = load_message(model.path, has_external_data=False)
        self._tensors = {tensor.name: tensor for tensor in model.tensors}
        self._inside: dict[str, Any] = {}
        self._outside: set[str] = set()
        self._assigned: dict[str, Array] = {}
        main: set[str] = set()
        for name, old in list(all_tensors(self.proto)):
            tensor = self._tensors.get(name)
            if tensor is None:
                continue
            slot = _slot(old)
            slot.Clear()
            slot.name, slot.data_type = old.name, old.data_type
            if old.is_main:
                main.add(name)
            if old.is_main and stands_outside(tensor.shape, old.data_type):
                self._outside.add(name)
                refer(slot, tensor.shape, tensor.nbytes)
            else:
                self._inside[name] = slot
                set_tensor_data(slot, self.value(name))
        self.names = frozenset(main)
        """The tensors of the main graph."""
        self.proto.ClearField("training_info")
        _delist(self.proto, main)
        _name_states(self.proto.graph)

    @property
    def network(self) -> OnnxNetwork:
        """The message with the numbers that it refers to."""
        return OnnxNetwork(self.proto, {name: self.value(name) for name in self._outside})

    def tensor(self, name: str) -> Tensor:
        """What the file says of a tensor."""
        return self._tensors[name]

    def value(self, name: str) -> Array:
        """The numbers of a tensor, not to be written to."""
        return self._assigned[name] if name in self._assigned else self.model.read(self._tensors[name])

    def copies(self, names: Iterable[str] | None = None) -> dict[str, Array]:
        """Copies of some tensors, or of all."""
        return {name: np.array(self.value(name)) for name in (self._tensors if names is None else names)}

    def assign(self, values: Mapping[str, Array]) -> None:
        """Replace the numbers of tensors, and of those that share their bytes in the file."""
        for name, value in values.items():
            tensor = self._tensors[name]
            if tensor.shape != np.shape(value):
                raise ValueError(f"{name} has the shape {tensor.shape}, not {np.shape(value)}")
            for tied in self._tensors.values():
                if tied.storage.key == tensor.storage.key:
                    self._put(tied, value)

    def _put(self, tensor: Tensor, value: Array) -> None:
        array = np.array(value, tensor.dtype).reshape(tensor.shape)
        self._assigned[tensor.name] = array
        if tensor.name in self._inside:
            set_tensor_data(self._inside[tensor.name], array)


def _slot(tensor: GraphTensor) -> Any:
    """An empty message of a tensor in the place of what was there."""
    if tensor.node is None and tensor.dense is not None:
        return tensor.dense
    if tensor.node is None:
        tensor.scope.sparse_initializer.remove(tensor.sparse)
        return tensor.scope.initializer.add()
    if tensor.is_main:
        tensor.scope.node.remove(tensor.node)
        return tensor.scope.initializer.add()
    del tensor.node.attribute[:]
    attribute = tensor.node.attribute.add()
    attribute.name, attribute.type = "value", _TENSOR
    return attribute.t


def _delist(proto: Any, main: set[str]) -> None:
    """Leave only what really goes in among the inputs."""
    proto.ir_version = max(proto.ir_version, _LISTED_BEFORE)
    inputs = [port for port in proto.graph.input if port.name not in main]
    del proto.graph.input[:]
    proto.graph.input.extend(inputs)


def _name_states(graph: Any) -> None:
    """Let every recurrent layer give its states, which its weights meet one step later."""
    for number, node in enumerate(graph.node):
        if node.op_type in CELLS and not output_of(node, 0):
            rest = list(node.output[1:])
            del node.output[:]
            node.output.extend([f"{_STATES}{number}", *rest])


@dataclass(frozen=True, slots=True)
class WeightSite:
    """A tensor at an input of a node."""

    name: str
    node: Any
    input: int
    """Number of the input."""
    order: tuple[int, ...]
    """Which axis of the tensor each axis is that the node sees."""
    shape: tuple[int, ...]
    """As the node sees it."""


def weight_sites(weights: LoadedWeights) -> list[WeightSite]:
    """Where a node uses a float tensor of the main graph, or what others have only handed on, in their order."""
    shapes = {name: weights.tensor(name).shape for name in weights.names if weights.tensor(name).is_float}
    views = {name: (name, tuple(range(len(shape)))) for name, shape in shapes.items()}
    sites: list[WeightSite] = []
    for node in weights.proto.graph.node:
        read = [(index, *views[value]) for index, value in enumerate(node.input) if value in views]
        behind = axes_behind(node, read[0][2]) if read else None
        if behind is not None and output_of(node, 0):
            views[output_of(node, 0)] = (read[0][1], behind)
        elif behind is None:
            sites += [
                WeightSite(name, node, index, order, tuple(shapes[name][axis] for axis in order))
                for index, name, order in read
            ]
    return sites
