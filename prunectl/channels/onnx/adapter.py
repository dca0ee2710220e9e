"""An ONNX network that can be cut: its message, the numbers of channels in it set right, and onnxruntime to run it."""

from __future__ import annotations

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
from prunectl.formats.onnx.rewrite import relocated
from prunectl.formats.onnx.tensors import CODES
from prunectl.formats.registry import open_model
from prunectl.formats.safe_json import require
from prunectl.onnx_graph import OnnxNetwork, OnnxSession, graph_tensors, names_read, save_network
from prunectl.pruning import destination as outputs
from prunectl.training.backend import LoadOptions


def read_onnx(model: ModelFile, origin: LoadOptions, data: DataShapes | None = None) -> OnnxAdapter:
    """The network of an ONNX file, which needs nothing else but the lengths of axes that it leaves open."""
    for option, value in (("--builder", origin.model), ("--custom-objects", origin.custom_objects)):
        if value:
            raise UsageError(
                f"{option} cannot be used with an ONNX file, which holds its own graph", hint=f"leave out {option}"
            )
    return OnnxAdapter(model, load_onnx(model, AxisLengths(origin.inputs, data)))


class OnnxAdapter(GraphAdapter):
    """An ONNX model, as cutting sees it."""

    def __init__(self, model: ModelFile, loaded: LoadedOnnx) -> None:
        self._model = model
        self._loaded = loaded

    @property
    def graph(self) -> ChannelGraph:
        return self._loaded.graph

    @property
    def copied_from(self) -> Mapping[str, str]:
        """Shared lists of numbers that were given to each reader by itself."""
        return self._loaded.copied_from

    @property
    def length_hint(self) -> str:
        return self._loaded.static.length_hint

    def prune(self, removed: RemovedIndices, after: PrunedShapes, weights: Mapping[str, Array]) -> Any:
        """The message of the smaller network."""
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
        """Never: onnxruntime convolves in float32 alone."""
        return False

    def runner(self, network: Any, observed: Iterable[str], *, in_float64: bool = False) -> Runner:
        """What onnxruntime makes of a network."""
        assert not in_float64
        names = tuple(observed)
        try:
            session = OnnxSession(network, names)
        except Exception as error:
            raise WorkError(f"onnxruntime cannot load the network: {first_line(error)}; nothing was written") from error
        outputs = [port.name for port in network.proto.graph.output]
        return lambda feeds: session.run([*outputs, *names], feeds)

    def write(self, network: Any, folder: Path, target: Path) -> WrittenNetwork:
        """Write a network, with the data beside it that was beside the original's."""
        # The zeros that recurrent layers began with: without a first state they begin so by themselves.
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
    """Random numbers for an input of a message."""
    code = CODES.get(port.type.tensor_type.elem_type)
    if code is None or code.dtype.kind not in "fiub":
        raise WorkError(f"prunectl cannot make random values for the input {port.name} of the network")
    # Whole numbers are small enough for any table of words.
    numbers = random.standard_normal(shape) if code.dtype.kind == "f" else random.integers(0, 2, shape)
    return numbers.astype(code.dtype)


def prune_model(
    loaded: LoadedOnnx, removed: RemovedIndices, after: PrunedShapes, weights: Mapping[str, Array]
) -> OnnxNetwork:
    """The smaller model; everything else in it stays as it was."""
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
"""Version of the format from which initializers are no inputs."""


def update_onnx_sizes(proto: Any, loaded: LoadedOnnx, after: PrunedShapes) -> None:
    """Set right what names a number of channels that is no longer true."""
    sizes = SizeConstants(proto, loaded, after)
    for node in list(proto.graph.node):
        rule = rule_of(node)
        if rule is not None and rule.resize and any(map(after.has_changed, (*node.input, *node.output))):
            rule.resize(node, sizes)
    sizes.remove_unused()


class SizeConstants:
    """A graph whose constants are replaced one by one: several nodes may share one."""

    def __init__(self, proto: Any, loaded: LoadedOnnx, after: PrunedShapes) -> None:
        self.constants = loaded.static.constants
        self.before = loaded.graph.shapes
        self.after = after
        self.ops = {op.outputs: op for op in loaded.graph.nodes}
        self.replaced: set[str] = set()
        """Values that may have no reader any more."""
        self._said: dict[tuple[str, tuple[int, ...]], str] = {}
        """What says other lengths than a value does, by these."""
        self._graph = proto.graph
        self._is_listed = proto.ir_version < _UNLISTED
        self._makers = {name: node for node in proto.graph.node for name in node.output}
        self._count = 0

    def remove_unused(self) -> None:
        """Remove what only made the numbers that were replaced."""
        waiting = list(self.replaced)
        for name in waiting:
            read = {name for node in self._graph.node for name in names_read(node)}
            if name in read or name in {port.name for port in (*self._graph.output, *self._graph.input)}:
                continue
            for tensor in [tensor for tensor in self._graph.initializer if tensor.name == name]:
                self._graph.initializer.remove(tensor)
            for node in [node for node in self._graph.node if list(node.output) == [name]]:
                waiting += node.input
                self._graph.node.remove(node)

    def update(self, node: Any, position: int, lengths: Sequence[int]) -> None:
        """Say other lengths at an input, where those that it says are made; other readers of these keep them."""
        node.input[position] = self._saying(node.input[position], tuple(lengths))

    def _saying(self, name: str, lengths: tuple[int, ...]) -> str:
        if (known := self._said.get((name, lengths))) is not None:
            return known
        maker, said = self._makers.get(name), name
        if self._is_static(name):
            said = self.add(name, np.array(lengths, self.constants[name].dtype))
        elif maker is not None and maker.op_type in {"Cast", "Identity"}:
            said = self._copy(maker, [self._saying(maker.input[0], lengths)])
        elif maker is not None and maker.op_type == "Concat":
            # What is measured while it runs is right by itself; what stands there is not.
            parts, begin = [], 0
            for part in maker.input:
                end = begin + self.constants[part].size
                is_right = list(map(int, self.constants[part])) == list(lengths[begin:end])
                parts.append(part if is_right or not self._is_static(part) else self._saying(part, lengths[begin:end]))
                begin = end
            said = self._copy(maker, parts)
        if said != name:
            self.replaced.add(name)
        self._said[name, lengths] = said
        return said

    def _copy(self, maker: Any, inputs: Sequence[str]) -> str:
        """The output of a node like another that reads other inputs; of that one itself, if it reads them already."""
        if list(maker.input) == list(inputs):
            return str(maker.output[0])
        made = type(maker)()
        made.CopyFrom(maker)
        made.input[:], made.output[:] = inputs, [self._free_name(maker.output[0])]
        made.name = made.name and made.output[0]
        self._graph.node.insert(list(self._graph.node).index(maker), made)
        self._makers[made.output[0]] = made
        return str(made.output[0])

    def replace(self, node: Any, position: int, lengths: Sequence[int]) -> None:
        """Say other lengths at an input by a constant of its own."""
        name = node.input[position]
        node.input[position] = self.add(name, np.array(lengths, self.constants[name].dtype))
        self.replaced.add(name)

    def _is_static(self, name: str) -> bool:
        """Whether a constant depends on no shape of a value."""
        maker = self._makers.get(name)
        if maker is None:
            return name in self.constants
        return maker.op_type == "Constant" or (
            maker.op_type not in {"Shape", "Size"} and all(map(self._is_static, filter(None, maker.input)))
        )

    def add(self, like: str, lengths: Array) -> str:
        """Add a constant, and return its name."""
        name = self._free_name(like)
        onnx = require("onnx", extra="onnx")
        tensor = onnx.numpy_helper.from_array(lengths, name)
        self._graph.initializer.append(tensor)
        if self._is_listed:
            self._graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, lengths.shape))
        return name

    def _free_name(self, like: str) -> str:
        taken = {tensor.name for tensor in self._graph.initializer} | self._makers.keys()
        name = like
        while name in taken:
            self._count += 1
            name = f"{like}_{self._count}"
        return name
