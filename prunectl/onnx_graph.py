"""ONNX networks in memory: walks over graphs; tensors inside or outside of the message, which is limited to 2 GB."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

from prunectl.errors import InputError, first_line
from prunectl.formats.base import Array, ModelFile, NameAllocator
from prunectl.formats.onnx.tensors import CODES, STRING
from prunectl.formats.safe_json import require
from prunectl.formats.workers import threads_from_env

STANDARD_DOMAINS = frozenset({"", "ai.onnx"})
FLOAT_TYPES = frozenset({1, 10, 11, 16})
"""Element types: float32, float16, float64, bfloat16."""
Axis = TypeVar("Axis", bound=int | None)


def find_attribute(node: Any, name: str) -> Any:
    """The protobuf message of an attribute; None if the node has no attribute of that name."""
    return next((attribute for attribute in node.attribute if attribute.name == name), None)


def get_attribute(node: Any, name: str, default: Any) -> Any:
    """An attribute as a plain value, lists as tuples."""
    attribute = find_attribute(node, name)
    if attribute is None:
        return default
    match attribute.type:
        case 1:
            return float(attribute.f)
        case 2:
            return int(attribute.i)
        case 3:
            return attribute.s.decode(errors="replace")
        case 8:
            return tuple(text.decode(errors="replace") for text in attribute.strings)
        case _:
            return tuple(attribute.ints)


def input_of(node: Any, index: int) -> str:
    """The name of an input; empty if the node omits it."""
    return str(node.input[index]) if index < len(node.input) else ""


def output_of(node: Any, index: int) -> str:
    """The name of an output; empty if the node omits it."""
    return str(node.output[index]) if index < len(node.output) else ""


def axes_behind(node: Any, axes: tuple[Axis, ...]) -> tuple[Axis, ...] | None:
    """The axes of a tensor after an Identity, Cast or Transpose node; None after any other node."""
    if node.domain not in STANDARD_DOMAINS:
        return None
    match node.op_type:
        case "Identity":
            return axes
        case "Cast" if get_attribute(node, "to", 0) in FLOAT_TYPES:
            return axes
        case "Transpose":
            return tuple(axes[axis] for axis in get_attribute(node, "perm", tuple(reversed(range(len(axes))))))
        case _:
            return None


def inner_graphs(node: Any) -> Iterator[tuple[str, Any]]:
    """Yield the graphs inside a node, such as the body of a loop, with the names that the file handler gives them."""
    for attribute in node.attribute:
        graphs = [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]
        for number, graph in enumerate(graphs):
            yield (attribute.name if len(graphs) == 1 else f"{attribute.name}_{number}"), graph


def all_graphs(graph: Any) -> Iterator[Any]:
    """Yield a graph and those inside its nodes, at any depth."""
    yield graph
    for node in graph.node:
        for _, inner in inner_graphs(node):
            yield from all_graphs(inner)


def names_defined(graph: Any) -> set[str]:
    """The names that a graph gives itself, which inside of it hide those of the graphs around it."""
    own = {value.name for value in (*graph.input, *graph.initializer)}
    return own | {name for node in graph.node for name in node.output}


def names_read(node: Any) -> Iterator[str]:
    """Yield the values that a node reads, including those that its inner graphs capture."""
    yield from filter(None, node.input)
    yield from names_captured(node)


def names_captured(node: Any) -> Iterator[str]:
    """Yield the values that the inner graphs of a node read from outside."""
    for _, inner in inner_graphs(node):
        own = names_defined(inner)
        yield from (name for inner_node in inner.node for name in names_read(inner_node) if name not in own)
        yield from (port.name for port in inner.output if port.name not in own)


def opset_of(proto: Any) -> int | None:
    """The version of the default operator set that a model imports."""
    return next((opset.version for opset in proto.opset_import if opset.domain in STANDARD_DOMAINS), None)


def copy_message(message: Any) -> Any:
    """A copy of a protobuf message, independent of the message that contains it."""
    copy = type(message)()
    copy.CopyFrom(message)
    return copy


MAX_MESSAGE_BYTES = (1 << 31) - 1
"""The size limit of a protobuf message."""
INLINE_BYTES = 1 << 15
"""Tensors up to this size stay in the message, where shapes, axes and initial states of zeros are looked for."""
_FLOAT, _EXTERNAL = 1, 1
_NUMBERS = "raw_data float_data int32_data int64_data double_data uint64_data dims external_data data_location"
"""The fields of a TensorProto that hold its data and its shape."""
_TENSOR = 4
"""AttributeProto.TENSOR."""


@dataclass(frozen=True, slots=True)
class OnnxNetwork:
    """A ModelProto, and the data of the initializers that it refers to without containing them."""

    proto: Any
    outside: dict[str, Array] = field(default_factory=dict)
    """Arrays by the name of the initializer in the main graph."""

    def copy(self) -> OnnxNetwork:
        """A copy whose tensors can be assigned without changing this network."""
        return OnnxNetwork(copy_message(self.proto), dict(self.outside))

    def assign(self, tensor: Any, array: Array) -> None:
        """Replace the data of one of its tensors."""
        if tensor.data_location == _EXTERNAL:
            self.outside[tensor.name] = array
            refer(tensor, array.shape, array.nbytes)
        else:
            set_tensor_data(tensor, array)


def load_message(path: Path, *, has_external_data: bool = True) -> Any:
    """The ModelProto of a file. The format handler has checked the paths of its external data."""
    with _reading(path) as onnx:
        return onnx.load(path, load_external_data=has_external_data)


@contextmanager
def _reading(path: Path) -> Iterator[ModuleType]:
    """The onnx library; any exception of it becomes an InputError about the file."""
    onnx = require("onnx", extra="onnx")
    try:
        yield onnx
    except Exception as error:
        raise InputError(f"onnx cannot read {path}: {first_line(error)}") from error


def is_too_large(proto: Any) -> bool:
    """Whether a model exceeds the limit of one protobuf message."""
    num_bytes = sum(len(initializer.raw_data) for graph in all_graphs(proto.graph) for initializer in graph.initializer)
    # ByteSize cannot measure a message beyond the limit.
    return bool(num_bytes > MAX_MESSAGE_BYTES or proto.ByteSize() > MAX_MESSAGE_BYTES)


def load_network(model: ModelFile) -> tuple[OnnxNetwork, dict[str, str]]:
    """A model whose large external tensors stay outside of the message, and the data file of each such initializer."""
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
    with _reading(model.path) as onnx:
        onnx.load_external_data_for_model(proto, str(model.path.parent))
    for name, initializer in outside.items():
        refer(initializer, tensors[name].shape, tensors[name].nbytes)
    return OnnxNetwork(proto, {name: model.read(tensors[name]) for name in outside}), locations


def save_network(network: OnnxNetwork, path: Path, locations: Mapping[str, str]) -> None:
    """Write a network, and the data of the initializers that have a location into new files beside it."""
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
    """Whether a tensor is too large to be copied with the message; types of less than a byte always stay inside."""
    bits = CODES[data_type].bits
    return len(shape) > 1 and bits >= 8 and math.prod(shape) * bits > INLINE_BYTES * 8


def set_tensor_data(tensor: Any, array: Array) -> None:
    """Replace the data and the shape of a tensor; its name, type and doc string stay."""
    _clear_data(tensor, array.shape)
    if CODES[tensor.data_type].bits >= 8:
        tensor.raw_data = np.ascontiguousarray(array).tobytes()
    else:
        tensor.raw_data = require("onnx.numpy_helper", extra="onnx").from_array(array).raw_data


def refer(tensor: Any, shape: tuple[int, ...], nbytes: int, location: str = "outside", offset: int = 0) -> None:
    """Make a tensor refer to external data; onnxruntime opens no file if it is given the data in memory."""
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
    """A numeric tensor of a graph: an initializer, or the value of a Constant node."""

    name: str
    """Its name in that graph."""
    data_type: int
    scope: Any
    """The graph or the function around it."""
    is_main: bool
    node: Any = None
    """The Constant node whose value it is."""
    dense: Any = None
    """Its TensorProto."""
    sparse: Any = None
    """Its SparseTensorProto."""


def all_tensors(model: Any) -> Iterator[tuple[str, GraphTensor]]:
    """Yield all tensors, named and ordered as the format handler does."""
    names = NameAllocator()
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


def densify(proto: Any, model: ModelFile) -> bool:
    """Make all sparse tensors dense; whether there were any."""
    from_array = require("onnx.numpy_helper", extra="onnx").from_array
    tensors = {tensor.name: tensor for tensor in model.tensors}
    stored = [(name, tensor) for name, tensor in all_tensors(proto) if tensor.sparse is not None and name in tensors]
    for name, tensor in stored:
        dense_slot(tensor).CopyFrom(from_array(np.ascontiguousarray(model.read(tensors[name])), tensor.name))
    remove_sources([tensor for _, tensor in stored])
    return bool(stored)


def dense_slot(tensor: GraphTensor) -> Any:
    """A TensorProto for the dense data of a tensor, beside its sparse form or in place of it."""
    if tensor.node is None and tensor.dense is not None:
        return tensor.dense
    if tensor.node is None or tensor.is_main:
        return tensor.scope.initializer.add()
    del tensor.node.attribute[:]
    attribute = tensor.node.attribute.add()
    attribute.name, attribute.type = "value", _TENSOR
    return attribute.t


def remove_sources(tensors: Sequence[GraphTensor]) -> None:
    """Remove the sparse forms and Constant nodes of tensors that now have a dense slot beside them."""
    # The `remove` of a repeated field compares whole messages, from the front.
    replaced = {id(tensor.sparse if tensor.node is None else tensor.node) for tensor in tensors if _is_beside(tensor)}
    for scope in {id(tensor.scope): tensor.scope for tensor in tensors if _is_beside(tensor)}.values():
        for messages in (scope.node, scope.sparse_initializer):
            for index in reversed([index for index, message in enumerate(messages) if id(message) in replaced]):
                del messages[index]


def _is_beside(tensor: GraphTensor) -> bool:
    return tensor.dense is None if tensor.node is None else tensor.is_main


def _training_graphs(part: Any) -> Iterator[Any]:
    yield from (getattr(part, field) for field in ("initialization", "algorithm") if part.HasField(field))


def graph_tensors(scope: Any, *, is_main: bool = True) -> Iterator[GraphTensor]:
    """Yield the tensors of one graph: initializers first, then the values of its Constant nodes."""
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
    """The array of a Constant node; None for a scalar or a list of integers, as in the format handler."""
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


_FATAL = 4
"""onnxruntime logs from this severity on; errors arrive as exceptions anyway."""


class OnnxSession:
    """A graph that is ready to run, with some inner values added to its outputs. Exceptions of onnxruntime pass."""

    def __init__(
        self,
        source: OnnxNetwork | Path,
        observed: Iterable[str] = (),
        *,
        num_threads: int = 0,
        is_optimized: bool = True,
        is_prepacked: bool = True,
        ends_there: bool = False,
    ) -> None:
        runtime = require("onnxruntime", extra="onnx")
        options = runtime.SessionOptions()
        options.log_severity_level = _FATAL
        # Unlike NumPy and PyTorch, onnxruntime ignores OMP_NUM_THREADS, and its waiting threads spin, which takes a
        # processor from whatever runs beside it.
        options.intra_op_num_threads = num_threads or threads_from_env()
        if not is_optimized:
            options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        if not is_prepacked:
            options.add_session_config_entry("session.disable_prepacking", "1")
        model: str | bytes = str(source)
        # Kept alive: onnxruntime does not copy the arrays.
        self._outside: dict[str, Array] = {}
        if isinstance(source, OnnxNetwork):
            proto = _with_outputs(source.proto, observed, ends_there=ends_there)
            types = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
            outside = ((name, array) for name, array in source.outside.items() if name in types)
            self._outside = {name: np.require(array, requirements=["C", "A"]) for name, array in outside}
            as_value = runtime.OrtValue.ortvalue_from_numpy_with_onnx_type
            values = [as_value(array, types[name]) for name, array in self._outside.items()]
            if values:
                options.add_external_initializers(list(self._outside), values)
            model = proto.SerializeToString()
        self.runtime = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def run(self, names: Collection[str], feeds: Mapping[str, Array]) -> list[Any]:
        """The values of some outputs for some inputs."""
        values: list[Any] = self.runtime.run(list(names), dict(feeds))
        return values


def _with_outputs(proto: Any, names: Iterable[str], *, ends_there: bool) -> Any:
    """A copy of a model with some inner values as further outputs, or as the only ones, later nodes removed."""
    copy = copy_message(proto)
    if ends_there:
        del copy.graph.output[:]
    known = {port.name for port in copy.graph.output}
    for name in names:
        if name not in known:
            copy.graph.output.add().name = name
    if ends_there:
        _keep_ancestors(copy.graph)
    return copy


def _keep_ancestors(graph: Any) -> None:
    """Remove nodes and tensors that no output depends on: onnxruntime would still run and require them."""
    wanted, kept = {port.name for port in graph.output}, []
    for node in reversed(graph.node):
        if not wanted.isdisjoint(node.output):
            kept.append(node)
            wanted.update(names_read(node))
    read = [tensor for tensor in graph.initializer if tensor.name in wanted]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(reversed(kept))
    graph.initializer.extend(read)
