"""The tensors of an ONNX message, and their numbers: in the message, or outside of it, as it has no room for 2 GB."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.errors import InputError, first_line
from prunectl.formats.base import Array, ModelFile
from prunectl.formats.onnx.model import Names
from prunectl.formats.onnx.tensors import CODES, STRING
from prunectl.formats.safe_json import require
from prunectl.graphs.onnx.nodes import all_graphs, copy_message, inner_graphs, output_of

MAX_MESSAGE_BYTES = (1 << 31) - 1
"""Limit of a protobuf message."""
INLINE_BYTES = 1 << 15
"""Up to this a tensor stays in the message, where shapes, axes and first states of zeros are looked for."""
_FLOAT, _EXTERNAL = 1, 1
_NUMBERS = "raw_data float_data int32_data int64_data double_data uint64_data dims external_data data_location"
"""The fields of a tensor that say its numbers and its shape."""


@dataclass(frozen=True, slots=True)
class OnnxNetwork:
    """A model, and the numbers that its message refers to without holding them."""

    proto: Any
    outside: dict[str, Array] = field(default_factory=dict)
    """By the names of initializers of the main graph."""

    def copy(self) -> OnnxNetwork:
        """A network of which tensors can be assigned without changing this one."""
        return OnnxNetwork(copy_message(self.proto), dict(self.outside))

    def assign(self, tensor: Any, array: Array) -> None:
        """Give one of its tensors other numbers."""
        if tensor.data_location == _EXTERNAL:
            self.outside[tensor.name] = array
            refer(tensor, array.shape, array.nbytes)
        else:
            set_tensor_data(tensor, array)


def load_message(path: Path, *, has_external_data: bool = True) -> Any:
    """The message of a model; its handler has checked where its external data lies."""
    onnx = require("onnx", extra="onnx")
    try:
        return onnx.load(path, load_external_data=has_external_data)
    except Exception as error:
        raise InputError(f"{path} cannot be read by onnx: {first_line(error)}") from error


def is_too_large(proto: Any) -> bool:
    """Whether a model exceeds the limit of one protobuf message."""
    num_bytes = sum(len(initializer.raw_data) for graph in all_graphs(proto.graph) for initializer in graph.initializer)
    # A message beyond the limit cannot be measured as a whole.
    return bool(num_bytes > MAX_MESSAGE_BYTES or proto.ByteSize() > MAX_MESSAGE_BYTES)


def load_network(model: ModelFile) -> tuple[OnnxNetwork, dict[str, str]]:
    """A model, its large external tensors outside, and the file beside it that each external initializer lies in."""
    proto = load_message(model.path, has_external_data=False)
    tensors = {tensor.name: tensor for tensor in model.tensors}
    locations: dict[str, str] = {}
    outside: dict[str, Any] = {}
    for initializer in proto.graph.initializer:
        tensor = tensors.get(initializer.name)
        if tensor is not None and initializer.data_location == _EXTERNAL:
            locations[tensor.name] = next(entry.value for entry in initializer.external_data if entry.key == "location")
            if stands_outside(tensor.shape, initializer.data_type):
                outside[tensor.name] = initializer
                initializer.ClearField("data_location")
    try:
        require("onnx", extra="onnx").load_external_data_for_model(proto, str(model.path.parent))
    except Exception as error:
        raise InputError(f"{model.path} cannot be read by onnx: {first_line(error)}") from error
    for name, initializer in outside.items():
        refer(initializer, tensors[name].shape, tensors[name].nbytes)
    return OnnxNetwork(proto, {name: model.read(tensors[name]) for name in outside}), locations


def save_network(network: OnnxNetwork, path: Path, locations: Mapping[str, str]) -> None:
    """Write a network, and the numbers of those initializers that have a location into new files beside it."""
    proto = copy_message(network.proto)
    for tensor in proto.graph.initializer:
        if tensor.name in locations:
            array, location = network.outside.get(tensor.name), locations[tensor.name]
            data = tensor.raw_data if array is None else np.ascontiguousarray(array).data
            with (path.parent / location).open("ab") as file:
                offset = file.tell()
                file.write(data)
            refer(tensor, tuple(tensor.dims), memoryview(data).nbytes, location, offset)
    path.write_bytes(proto.SerializeToString())


def stands_outside(shape: tuple[int, ...], data_type: int) -> bool:
    """Whether a tensor is too large to be copied with the message; what has less than a byte is in it always."""
    bits = CODES[data_type].bits
    return len(shape) > 1 and bits >= 8 and math.prod(shape) * bits > INLINE_BYTES * 8


def set_tensor_data(tensor: Any, array: Array) -> None:
    """Give a tensor other numbers; its name, its type and what is said of it stay."""
    _clear_data(tensor, array.shape)
    if CODES[tensor.data_type].bits >= 8:
        tensor.raw_data = np.ascontiguousarray(array).tobytes()
    else:
        tensor.raw_data = require("onnx.numpy_helper", extra="onnx").from_array(array).raw_data


def refer(tensor: Any, shape: tuple[int, ...], nbytes: int, location: str = "outside", offset: int = 0) -> None:
    """Let a tensor refer to numbers that lie elsewhere; onnxruntime looks for no file if they are given to it."""
    _clear_data(tensor, shape)
    tensor.data_location = _EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", nbytes)):
        tensor.external_data.add(key=key, value=str(value))


def _clear_data(tensor: Any, shape: tuple[int, ...]) -> None:
    for name in _NUMBERS.split():
        tensor.ClearField(name)
    tensor.dims.extend(shape)


@dataclass(frozen=True, slots=True)
class GraphTensor:
    """A tensor of numbers, in a graph or in a Constant node of it."""

    name: str
    """Its name in that graph."""
    data_type: int
    scope: Any
    """The graph or the function around it."""
    is_main: bool
    node: Any = None
    """The Constant node that makes it."""
    dense: Any = None
    """The message of its numbers."""
    sparse: Any = None
    """The message of its numbers without the zeros."""


def all_tensors(model: Any) -> Iterator[tuple[str, GraphTensor]]:
    """Yield all tensors with the names, and in the order, that the file handler gives them."""
    names = Names()
    waiting: list[tuple[str, Any]] = [("", model.graph)]
    waiting += [(f"{function.name}/", function) for function in model.functions]
    training = [graph for part in model.training_info for graph in _training_graphs(part)]
    waiting += [(f"training_{number}/", graph) for number, graph in enumerate(training)]
    for number, (prefix, scope) in enumerate(waiting):
        for tensor in graph_tensors(scope, is_main=number == 0):
            yield names.unique(prefix + tensor.name), tensor
        for node in scope.node:
            label = node.name or output_of(node, 0) or node.op_type
            waiting.extend((f"{prefix}{label}/{name}/", graph) for name, graph in inner_graphs(node))


def _training_graphs(part: Any) -> Iterator[Any]:
    yield from (getattr(part, field) for field in ("initialization", "algorithm") if part.HasField(field))


def graph_tensors(scope: Any, *, is_main: bool = True) -> Iterator[GraphTensor]:
    """Yield the tensors of one graph: initializers first, then what its Constant nodes make."""
    for tensor in getattr(scope, "initializer", ()):
        if tensor.data_type != STRING:
            yield GraphTensor(tensor.name, tensor.data_type, scope, is_main, dense=tensor)
    for sparse in getattr(scope, "sparse_initializer", ()):
        yield GraphTensor(sparse.values.name, sparse.values.data_type, scope, is_main, sparse=sparse)
    for node in scope.node:
        tensor = _constant(node, scope, is_main=is_main)
        if tensor is not None and tensor.data_type != STRING:
            yield tensor


def _constant(node: Any, scope: Any, *, is_main: bool) -> GraphTensor | None:
    """The array that a Constant node makes; none for a scalar or a list of whole numbers, as in the handler."""
    if node.op_type != "Constant" or not node.output:
        return None
    name = node.output[0]
    for attribute in node.attribute:
        if attribute.name == "value" and attribute.t.dims:
            return GraphTensor(name, attribute.t.data_type, scope, is_main, node, dense=attribute.t)
        if attribute.name == "sparse_value":
            sparse = attribute.sparse_tensor
            return GraphTensor(name, sparse.values.data_type, scope, is_main, node, sparse=sparse)
        if attribute.name == "value_floats":
            return GraphTensor(name, _FLOAT, scope, is_main, node)
    return None
