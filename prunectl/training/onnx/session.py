"""ONNX models in onnxruntime: weights that can be replaced, sessions that return inner values, padded batches."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from prunectl.errors import InputError, UsageError, first_line
from prunectl.formats.base import Array, ModelFile, Tensor
from prunectl.formats.onnx.tensors import CODES, STRING
from prunectl.formats.onnx.usage import CELLS
from prunectl.onnx_graph import (
    OnnxNetwork,
    OnnxSession,
    all_tensors,
    axes_behind,
    dense_slot,
    load_message,
    output_of,
    refer,
    remove_sources,
    set_tensor_data,
    stands_outside,
)
from prunectl.training.backend import ModelSignature, TensorSpec
from prunectl.training.data.source import Arrays, as_tuple, fill_rows
from prunectl.training.task import FinalActivation, format_shape, shape_matches


class Session:
    """A graph that is ready to run, with the weights at this time; later assignments need a new session."""

    def __init__(self, weights: LoadedWeights, inner: Collection[str] = ()) -> None:
        self._path = weights.model.path
        try:
            # For inner values, optimisation is off: the session is built faster, and the values are computed anyway.
            # Prepacking is off: after every assignment, it would keep a second copy of each weight.
            self._session = OnnxSession(
                weights.network, inner, is_optimized=not inner, is_prepacked=False, ends_there=bool(inner)
            )
        except Exception as error:
            raise InputError(f"onnxruntime cannot load {self._path}: {first_line(error)}") from error

    def run(self, names: Collection[str], feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph on some inputs, and return the values with these names."""
        try:
            values = self._session.run(names, feeds)
        except Exception as error:
            raise InputError(f"onnxruntime cannot run {self._path}: {first_line(error)}") from error
        for name, value in zip(names, values, strict=True):
            if not isinstance(value, np.ndarray):
                raise InputError(f"{self._path} cannot be used: its value {name!r} is not an array of numbers")
        return dict(zip(names, values, strict=True))


Shape = tuple[int | None, ...]


def signature(graph: Any) -> ModelSignature:
    """The inputs and outputs of a graph, without the batch axis."""
    nodes = {name: node for node in graph.node for name in node.output}
    outputs = tuple(
        replace(port_spec(port), activation=_activation(nodes, port.name), is_label=_is_label(nodes, port.name))
        for port in array_outputs(graph)
    )
    return ModelSignature(tuple(map(port_spec, graph.input)), outputs, is_channels_first=True)


_NO_ARRAYS = frozenset({"sequence_type", "map_type", "optional_type", "sparse_tensor_type"})


def array_outputs(graph: Any) -> list[Any]:
    """The numeric outputs: classifiers from scikit-learn also return strings, and dictionaries (ZipMap)."""
    return [
        port
        for port in graph.output
        if port.type.WhichOneof("value") not in _NO_ARRAYS and port.type.tensor_type.elem_type != STRING
    ]


_PASSED_ON = frozenset({"Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Cast"})
_ACTIVATIONS = {
    "Softmax": FinalActivation.SOFTMAX,
    "LogSoftmax": FinalActivation.LOG_SOFTMAX,
    "Sigmoid": FinalActivation.SIGMOID,
}
_RAW = frozenset({"Gemm", "MatMul", "Conv", "Add", "Relu", "BatchNormalization", "Tanh", "GlobalAveragePool"})


_LABELS = frozenset({"ArgMax", "LabelEncoder", "LinearClassifier", "SVMClassifier", "TreeEnsembleClassifier"})
"""Nodes whose first output is labels."""
_LOOKUPS = frozenset({"ArrayFeatureExtractor", "Gather"})
"""Nodes that scikit-learn's converters turn indices (the second input) into labels with."""


def _activation(nodes: Mapping[str, Any], name: str) -> FinalActivation:
    """The last activation, judged by the node that computes an output; UNKNOWN for other nodes."""
    name = _origin(nodes, name)
    kind = node.op_type if (node := nodes.get(name)) is not None else ""
    return _ACTIVATIONS.get(kind, FinalActivation.RAW if kind in _RAW else FinalActivation.UNKNOWN)


def _is_label(nodes: Mapping[str, Any], name: str) -> bool:
    """Whether a node that computes labels computes an output, directly or as the indices of labels."""
    name = _origin(nodes, name)
    node = nodes.get(name)
    if node is not None and node.op_type in _LOOKUPS:
        name = _origin(nodes, node.input[1])
        node = nodes.get(name)
    return node is not None and node.op_type in _LABELS and node.output[0] == name


def _origin(nodes: Mapping[str, Any], name: str) -> str:
    """The value that an output repeats, in another shape or type."""
    for _ in range(len(nodes)):
        node = nodes.get(name)
        if node is None or not node.input or node.op_type not in _PASSED_ON:
            break
        name = node.input[0]
    return name


def fixed_batch_size(graph: Any) -> int | None:
    """The batch size of the inputs if it is fixed; else None."""
    shapes = [_shape(port) for port in graph.input]
    sizes = {shape[0] if shape else None for shape in shapes}
    return next(iter(sizes)) if len(sizes) == 1 else None


def feeds(graph: Any, x: Arrays, *, is_any_count: bool) -> dict[str, Array]:
    """The array for each input by name; UsageError if one does not fit. `is_any_count` allows any batch size."""
    arrays = as_tuple(x)
    if len(arrays) != len(graph.input):
        wanted = f"{len(graph.input)} input{'s' * (len(graph.input) != 1)}"
        raise UsageError(f"the model has {wanted}, but {len(arrays)} {'is' if len(arrays) == 1 else 'are'} given")
    return {
        port.name: _fed(port, np.asarray(array), is_any_count=is_any_count)
        for port, array in zip(graph.input, arrays, strict=True)
    }


def _fed(port: Any, array: Array, *, is_any_count: bool) -> Array:
    shape = _shape(port)
    if shape is not None:
        expected = (None, *shape[1:]) if is_any_count else shape
        if not shape_matches(array.shape, expected):
            actual_text, wanted = format_shape(array.shape, "()"), format_shape(expected, "()")
            raise UsageError(f"the input {port.name!r} of the model has the shape {wanted}, but {actual_text} is given")
    code = CODES.get(port.type.tensor_type.elem_type)
    if code is None or array.dtype == code.dtype:
        return array
    if not np.can_cast(array.dtype, code.dtype, "same_kind"):
        raise UsageError(f"the input {port.name!r} of the model is {code.dtype}, but {array.dtype} is given")
    return array.astype(code.dtype)


def port_spec(port: Any) -> TensorSpec:
    """The name, shape and dtype of an input or output, without the batch axis."""
    shape, code = _shape(port), CODES.get(port.type.tensor_type.elem_type)
    return TensorSpec(port.name, None if shape is None else shape[1:], "" if code is None else code.dtype.name)


def _shape(port: Any) -> Shape | None:
    """The shape with the batch axis; None if it is unknown."""
    kind = port.type.tensor_type
    if not port.type.HasField("tensor_type") or not kind.HasField("shape"):
        return None
    return tuple(
        axis.dim_value if axis.HasField("dim_value") and axis.dim_value > 0 else None for axis in kind.shape.dim
    )


@dataclass(frozen=True, slots=True)
class RunValues:
    """The values of a run of the graph, by name."""

    values: Mapping[str, Array]
    batch_size: int | None = None
    """The number of examples, if some of them are padding; else None."""
    count: int = 0
    """The number of examples that are not padding."""

    def __getitem__(self, name: str) -> Array:
        return self.values[name]

    def axis(self, shape: tuple[int, ...]) -> int | None:
        """The batch axis: the first whose length is the batch size, else the first whose length is a multiple of it."""
        assert self.batch_size is not None
        exact = (axis for axis, length in enumerate(shape) if length == self.batch_size)
        parts = (axis for axis, length in enumerate(shape) if length and length % self.batch_size == 0)
        return next(exact, next(parts, None))

    def real(self, array: Array, axes: int) -> Array | None:
        """An array without the padding; None if none of its first `axes` axes can be the batch axis."""
        if self.batch_size is None:
            return array
        axis = self.axis(array.shape[:axes])
        if axis is None:
            return None
        kept = array.shape[axis] // self.batch_size * self.count
        real: Array = array[(slice(None),) * axis + (slice(kept),)]
        return real


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """The inputs of one run, filled up to the batch size."""

    feeds: Mapping[str, Array]
    batch_size: int
    count: int
    """The number of examples that are not padding; the padding repeats the first of them."""

    def run_values(self, values: Mapping[str, Array]) -> RunValues:
        """The values of a run on this batch."""
        return RunValues(values, self.batch_size, self.count) if self.count < self.batch_size else RunValues(values)


def split_batches(feeds: Mapping[str, Array], size: int | None) -> Iterator[PaddedBatch]:
    """Yield batches of a fixed size, or everything as one batch if the size is None."""
    total = max((len(array) for array in feeds.values() if array.ndim), default=0)
    if size is None or size == total:
        yield PaddedBatch(feeds, total, total)
        return
    for begin in range(0, total, size):
        part = {name: array[begin : begin + size] for name, array in feeds.items()}
        count = min(size, total - begin)
        yield PaddedBatch({name: fill_rows(array, size) for name, array in part.items()}, size, count)


def join_outputs(outputs: Sequence[tuple[PaddedBatch, Array]]) -> Array | None:
    """The outputs of all batches as one array without padding; None if it has no batch axis."""
    first, array = outputs[0]
    if len(outputs) == 1 and first.count == first.batch_size:
        return array
    axis = RunValues({}, first.batch_size).axis(array.shape)
    cut = [RunValues({}, batch.batch_size, batch.count).real(array, array.ndim) for batch, array in outputs]
    if axis is None:
        return None
    return np.concatenate([array for array in cut if array is not None], axis=axis)


_LISTED_BEFORE = 4
"""The IR version before which initializers had to be listed among the graph inputs."""
_STATES = "prunectl/states_"


class LoadedWeights:
    """A model whose tensors can be replaced; tensors that were not replaced are read from the file when needed.

    In its ModelProto all tensors are dense, those of the main graph are initializers, and large ones are external.
    """

    def __init__(self, model: ModelFile) -> None:
        self.model = model
        self.proto = load_message(model.path, has_external_data=False)
        self._tensors = {tensor.name: tensor for tensor in model.tensors}
        self._inside: dict[str, Any] = {}
        self._outside: set[str] = set()
        self._assigned: dict[str, Array] = {}
        main: set[str] = set()
        stored = [(name, old) for name, old in all_tensors(self.proto) if name in self._tensors]
        for name, old in stored:
            tensor, slot = self._tensors[name], dense_slot(old)
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
        remove_sources([old for _, old in stored])
        self.names = frozenset(main)
        """The tensors of the main graph."""
        self.proto.ClearField("training_info")
        _delist(self.proto, main)
        _name_states(self.proto.graph)

    @property
    def network(self) -> OnnxNetwork:
        """The ModelProto, with the arrays of its external tensors."""
        return OnnxNetwork(self.proto, {name: self.value(name) for name in self._outside})

    def tensor(self, name: str) -> Tensor:
        """The description of a tensor in the file."""
        return self._tensors[name]

    def value(self, name: str) -> Array:
        """The array of a tensor, which must not be written to."""
        return self._assigned[name] if name in self._assigned else self.model.read(self._tensors[name])

    def copies(self, names: Iterable[str] | None = None) -> dict[str, Array]:
        """Copies of some tensors, or of all."""
        return {name: np.array(self.value(name)) for name in (self._tensors if names is None else names)}

    def assign(self, values: Mapping[str, Array]) -> None:
        """Replace the arrays of tensors, and of tensors that share their bytes in the file."""
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


def _delist(proto: Any, main: set[str]) -> None:
    """Remove the tensors from the graph inputs."""
    proto.ir_version = max(proto.ir_version, _LISTED_BEFORE)
    inputs = [port for port in proto.graph.input if port.name not in main]
    del proto.graph.input[:]
    proto.graph.input.extend(inputs)


def _name_states(graph: Any) -> None:
    """Name the output of recurrent layers that leave it out: the states, which their weights read one step later."""
    for number, node in enumerate(graph.node):
        if node.op_type in CELLS and not output_of(node, 0):
            rest = list(node.output[1:])
            del node.output[:]
            node.output.extend([f"{_STATES}{number}", *rest])


@dataclass(frozen=True, slots=True)
class WeightSite:
    """A use of a tensor: a node that reads the tensor or a view of it."""

    name: str
    node: Any
    input: int
    """The position of the input."""
    order: tuple[int, ...]
    """For each axis of the view the axis of the tensor."""
    shape: tuple[int, ...]
    """The shape of the view."""


def weight_sites(weights: LoadedWeights) -> list[WeightSite]:
    """The uses of the float tensors of the main graph, also through views such as Transpose, in the order of nodes."""
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
