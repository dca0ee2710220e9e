"""The adapter of ONNX: prunes a ModelProto, updates the channel counts in its nodes, and runs it with onnxruntime."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.channels.adapter import (
    Feeds,
    GraphAdapter,
    PrunedShapes,
    RemovedIndices,
    Runner,
    WrittenNetwork,
    delete_indices,
    removed_by_tensor,
)
from prunectl.channels.graph import ChannelGraph
from prunectl.channels.lengths import AxisLengths, DataShapes
from prunectl.channels.onnx.graph import LoadedOnnx, load_onnx, reshare
from prunectl.channels.onnx.ops import rule_of
from prunectl.errors import UsageError, WorkError, first_line
from prunectl.formats.base import Array, ModelFile
from prunectl.formats.budgets import MAX_PASSED_OPERATORS
from prunectl.formats.onnx.rewrite import relocated
from prunectl.formats.onnx.tensors import CODES
from prunectl.formats.registry import open_model
from prunectl.formats.safe_json import require
from prunectl.onnx_graph import (
    OnnxNetwork,
    OnnxSession,
    all_graphs,
    copy_message,
    graph_tensors,
    names_defined,
    names_read,
    save_network,
)
from prunectl.pruning import destination as outputs
from prunectl.training.backend import LoadOptions


def read_onnx(model: ModelFile, origin: LoadOptions, data: DataShapes | None = None) -> OnnxAdapter:
    """The adapter of an ONNX file; `origin` and `data` only give the lengths of axes that the file leaves open."""
    for option, value in (("--builder", origin.model), ("--custom-objects", origin.custom_objects)):
        if value:
            raise UsageError(
                f"{option} cannot be used with an ONNX file, which holds its own graph", hint=f"leave out {option}"
            )
    return OnnxAdapter(model, load_onnx(model, AxisLengths(origin.inputs, data)))


class OnnxAdapter(GraphAdapter):
    """The adapter of an ONNX model."""

    def __init__(self, model: ModelFile, loaded: LoadedOnnx) -> None:
        self._model = model
        self._loaded = loaded

    @property
    def graph(self) -> ChannelGraph:
        return self._loaded.graph

    @property
    def copied_from(self) -> Mapping[str, str]:
        """The originals of shared vectors, of which each reader got its own copy."""
        return self._loaded.copied_from

    @property
    def length_hint(self) -> str:
        return self._loaded.static.length_hint

    def prune(self, removed: RemovedIndices, after: PrunedShapes, weights: Mapping[str, Array]) -> Any:
        """A copy of the ONNX model without the removed channels."""
        return prune_model(self._loaded, removed, after, weights)

    def with_weights(self, weights: Mapping[str, Array]) -> Any:
        network = self._loaded.network.copy()
        for tensor in graph_tensors(network.proto.graph):
            if tensor.name in weights:
                network.assign(tensor.dense, weights[tensor.name])
        return network

    def random_inputs(self, random: np.random.Generator) -> Feeds:
        shapes = self._loaded.static.shapes
        ports = {port.name: port for port in self._loaded.network.proto.graph.input}
        return {name: random_input(ports[name], shapes[name], random) for name in self.graph.inputs}

    @property
    def has_float64(self) -> bool:
        """False: onnxruntime has convolutions in float32 only."""
        return False

    def runner(self, network: Any, observed: Iterable[str], *, in_float64: bool = False) -> Runner:
        """A function that runs a network in onnxruntime."""
        assert not in_float64
        names = tuple(observed)
        try:
            session = OnnxSession(network, names)
        except Exception as error:
            raise WorkError(f"onnxruntime cannot load the network: {first_line(error)}; nothing was written") from error
        outputs = [port.name for port in network.proto.graph.output]
        return lambda feeds: session.run([*outputs, *names], feeds)

    def write(self, network: Any, folder: Path, target: Path) -> WrittenNetwork:
        """Write a network, with external data in files like those of the original."""
        # Initial states of zeros were removed: recurrent layers start from zeros anyway.
        remaining = {tensor.name for tensor in graph_tensors(network.proto.graph)}
        dropped = [name for name, array in self.graph.weights.items() if name not in remaining and not array.any()]
        staged = outputs.staged_paths(self._model, folder, target)
        locations = {
            name: relocated(self._model, staged, location) or location
            for name, location in self._loaded.locations.items()
        }
        path = staged[self._model.path]
        save_network(network, path, locations)
        result = open_model(path)
        for tensor in result.tensors:
            array = network.outside.get(tensor.name)
            if array is not None and result.read(tensor).tobytes() != array.tobytes():
                raise WorkError(f"{tensor.name} has different values in the output; nothing was written")
        return WrittenNetwork(path, omitted_tensors=frozenset(dropped))


def random_input(port: Any, shape: Sequence[int], random: np.random.Generator) -> Array:
    """Random numbers for an input of an ONNX graph."""
    code = CODES.get(port.type.tensor_type.elem_type)
    if code is None or code.dtype.kind not in "fiub":
        raise WorkError(f"prunectl cannot make random values for the input {port.name} of the network")
    # Integers are 0 or 1, valid indices of any embedding table.
    numbers = random.standard_normal(shape) if code.dtype.kind == "f" else random.integers(0, 2, shape)
    return numbers.astype(code.dtype)


def prune_model(
    loaded: LoadedOnnx, removed: RemovedIndices, after: PrunedShapes, weights: Mapping[str, Array]
) -> OnnxNetwork:
    """A copy of the model without the removed channels; everything else stays as it was."""
    network = loaded.network.copy()
    proto = network.proto
    shapes, removed_by_name = {}, removed_by_tensor(removed)
    for tensor in graph_tensors(proto.graph):
        name, axes = tensor.name, removed_by_name.get(tensor.name, {})
        if axes or name in weights:
            array = delete_indices(weights[name] if name in weights else loaded.graph.weights[name], axes)
            network.assign(tensor.dense, array)
        if axes:
            shapes[name] = array.shape
    for port in proto.graph.input:
        if port.name in shapes:
            for axis, length in zip(port.type.tensor_type.shape.dim, shapes[port.name], strict=True):
                axis.dim_value = length
    update_onnx_sizes(proto, loaded, after)
    reshare(proto, loaded.copied_from)
    _drop_stale_shapes(proto.graph, {name for name, view in loaded.graph.views.items() if view.tensor in shapes}, after)
    return network


def _drop_stale_shapes(graph: Any, stale: set[str], after: PrunedShapes) -> None:
    kept = [port for port in graph.value_info if port.name not in stale and not after.has_changed(port.name)]
    del graph.value_info[:]
    graph.value_info.extend(kept)


_UNLISTED = 4
"""The IR version from which initializers need not be listed as graph inputs."""


def update_onnx_sizes(proto: Any, loaded: LoadedOnnx, after: PrunedShapes) -> None:
    """Update the attributes and constants of nodes that hold numbers of channels."""
    sizes = SizeConstants(proto, loaded, after)
    for node in proto.graph.node:
        rule = rule_of(node)
        if rule is not None and rule.resize and any(map(after.has_changed, (*node.input, *node.output))):
            rule.resize(node, sizes)
    sizes.finish()


class SizeConstants:
    """Replaces constants that hold sizes, one use at a time, as several nodes may share a constant."""

    def __init__(self, proto: Any, loaded: LoadedOnnx, after: PrunedShapes) -> None:
        self.constants = loaded.static.constants
        self.before = loaded.graph.shapes
        self.after = after
        self.ops = {op.outputs: op for op in loaded.graph.nodes}
        self.replaced: set[str] = set()
        """Values that may have lost their last reader."""
        self._renamed: dict[tuple[str, tuple[int, ...]], str] = {}
        """The replacement of a value, by the name of the value and the new lengths."""
        self._graph = proto.graph
        self._is_listed = proto.ir_version < _UNLISTED
        self._nodes = list(proto.graph.node)
        self._makers = {name: node for node in self._nodes for name in node.output}
        self._copies: dict[int, list[Any]] = {}
        """Copies of nodes, to be inserted before the original, by the `id` of the original."""
        self._taken = {name for graph in all_graphs(proto.graph) for name in names_defined(graph)}
        self._taken.update(node.name for node in self._nodes)
        self._static = self.constants.keys() - self._makers.keys() | {""}
        """Constants, and values computed from constants only, not from the shape of a value."""
        for node in self._nodes:
            is_measured = node.op_type in {"Shape", "Size"}
            if node.op_type == "Constant" or (not is_measured and all(map(self._static.__contains__, node.input))):
                self._static.update(node.output)
        self._count = 0

    def finish(self) -> None:
        """Insert the copied nodes, and remove nodes and constants that only replaced values needed."""
        unused = self._unused()
        for number, node in reversed(list(enumerate(self._nodes))):
            if unused.intersection(node.output):
                del self._graph.node[number]
            for copy in self._copies.get(id(node), ()):
                self._graph.node.insert(number, copy)
        for number, tensor in reversed(list(enumerate(self._graph.initializer))):
            if tensor.name in unused:
                del self._graph.initializer[number]

    def _unused(self) -> set[str]:
        """Replaced values without readers, and the values that only they were computed from."""
        nodes = [*self._nodes, *(copy for copies in self._copies.values() for copy in copies)]
        readers = Counter(name for node in nodes for name in names_read(node))
        readers.update(port.name for port in (*self._graph.output, *self._graph.input))
        unused: set[str] = set()
        waiting = list(self.replaced)
        for name in waiting:
            maker = self._makers.get(name)
            if readers[name] or name in unused or (maker is not None and len(maker.output) > 1):
                continue
            unused.add(name)
            read = list(names_read(maker)) if maker is not None else []
            readers.subtract(read)
            waiting += read
        return unused

    def update(self, node: Any, position: int, lengths: Sequence[int]) -> None:
        """Make an input hold other lengths, even if it is computed; other readers of the old value keep it."""
        node.input[position] = self._with_lengths(node.input[position], tuple(lengths), MAX_PASSED_OPERATORS)

    def _with_lengths(self, name: str, lengths: tuple[int, ...], steps: int) -> str:
        """The name of the replacement of a value that holds these lengths; its own name if an unknown node makes it."""
        if (known := self._renamed.get((name, lengths))) is not None:
            return known
        maker, replacement = self._makers.get(name), name
        if name in self._static:
            replacement = self.add(name, np.array(lengths, self.constants[name].dtype))
        elif steps and maker is not None and maker.op_type in {"Cast", "Identity"}:
            replacement = self._copy(maker, [self._with_lengths(maker.input[0], lengths, steps - 1)])
        elif steps and maker is not None and maker.op_type == "Concat":
            # Parts that are measured at run time, by Shape, are right by themselves; constant parts are not.
            parts, begin = [], 0
            for part in maker.input:
                end = begin + self.constants[part].size
                is_right = list(map(int, self.constants[part])) == list(lengths[begin:end])
                parts.append(part if is_right else self._with_lengths(part, lengths[begin:end], steps - 1))
                begin = end
            replacement = self._copy(maker, parts)
        if replacement != name:
            self.replaced.add(name)
        self._renamed[name, lengths] = replacement
        return replacement

    def _copy(self, node: Any, inputs: Sequence[str]) -> str:
        """The output of a copy of a node that reads other inputs; that of the node itself if it reads them already."""
        if list(node.input) == list(inputs):
            return str(node.output[0])
        copy = copy_message(node)
        copy.input[:], copy.output[:] = inputs, [self._free_name(node.output[0])]
        copy.name = copy.name and copy.output[0]
        self._copies.setdefault(id(node), []).append(copy)
        return str(copy.output[0])

    def replace(self, node: Any, position: int, lengths: Sequence[int]) -> None:
        """Replace an input with a new constant."""
        name = node.input[position]
        node.input[position] = self.add(name, np.array(lengths, self.constants[name].dtype))
        self.replaced.add(name)

    def add(self, like: str, lengths: Array) -> str:
        """Add a constant with a name like that of another, and return its name."""
        name = self._free_name(like)
        onnx = require("onnx", extra="onnx")
        tensor = onnx.numpy_helper.from_array(lengths, name)
        self._graph.initializer.append(tensor)
        if self._is_listed:
            self._graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, lengths.shape))
        return name

    def _free_name(self, like: str) -> str:
        name = like
        while name in self._taken:
            self._count += 1
            name = f"{like}_{self._count}"
        self._taken.add(name)
        return name
