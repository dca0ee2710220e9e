"""An ONNX network that can be cut: its message in memory, run by onnxruntime."""

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
)
from prunectl.channels.graph import ChannelGraph
from prunectl.channels.lengths import AxisLengths, DataShapes
from prunectl.channels.onnx.graph import LoadedOnnx, load_onnx
from prunectl.channels.onnx.resize import prune_model
from prunectl.errors import UsageError, WorkError, first_line
from prunectl.formats.base import Array, ModelFile
from prunectl.formats.onnx.rewrite import relocated
from prunectl.formats.onnx.tensors import CODES
from prunectl.formats.registry import open_model
from prunectl.graphs.onnx.session import OnnxSession
from prunectl.graphs.onnx.tensors import graph_tensors, save_network
from prunectl.pruning import destination as outputs
from prunectl.training.backend import LoadOptions


def random_input(port: Any, shape: Sequence[int], random: np.random.Generator) -> Array:
    """Random numbers for an input of a message."""
    code = CODES.get(port.type.tensor_type.elem_type)
    if code is None or code.dtype.kind not in "fiub":
        raise WorkError(f"the network takes an input, {port.name}, of which nothing random can be made")
    # Whole numbers are small enough for any table of words.
    numbers = random.standard_normal(shape) if code.dtype.kind == "f" else random.integers(0, 2, shape)
    return numbers.astype(code.dtype)


def read_onnx(model: ModelFile, origin: LoadOptions, data: DataShapes | None = None) -> OnnxAdapter:
    """The network of an ONNX file, which needs nothing else but the lengths of axes that it leaves open."""
    for option, value in (("--model", origin.model), ("--custom-objects", origin.custom_objects)):
        if value:
            raise UsageError(
                f"{option} does not go with an ONNX file, which says all by itself", hint=f"leave out {option}"
            )
    return OnnxAdapter(model, load_onnx(model, AxisLengths(origin.inputs, data)))


class OnnxAdapter(GraphAdapter):
    """An ONNX model, as cutting sees it."""

    def __init__(self, model: ModelFile, loaded: LoadedOnnx) -> None:
        self._model = model
        self._loaded = loaded

    @property
    def graph(self) -> ChannelGraph:
        """What can be followed."""
        return self._loaded.graph

    @property
    def copied_from(self) -> Mapping[str, str]:
        """Shared lists of numbers that were given to each reader by itself."""
        return self._loaded.copied_from

    def prune(self, removed: RemovedIndices, after: PrunedShapes, weights: Mapping[str, Array]) -> Any:
        """The message of the smaller network."""
        return prune_model(self._loaded, removed, after, weights)

    def with_weights(self, weights: Mapping[str, Array]) -> Any:
        """The network with some numbers replaced."""
        network = self._loaded.network.copy()
        for tensor in graph_tensors(network.proto.graph):
            if tensor.name in weights:
                network.assign(tensor.dense, weights[tensor.name])
        return network

    def random_inputs(self, random: np.random.Generator) -> Feeds:
        """Random inputs."""
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
            raise WorkError(
                f"the network cannot be loaded by onnxruntime: {first_line(error)}; nothing was written"
            ) from error
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
                raise WorkError(f"{tensor.name} came out with other numbers than it has; nothing was written")
        return WrittenNetwork(path, omitted_tensors=frozenset(dropped))
