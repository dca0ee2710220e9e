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
)
from prunectl.channels.graph import ChannelGraph
from prunectl.channels.lengths import AxisLengths, Shapes
from prunectl.channels.onnx import graph
from prunectl.channels.onnx.graph import LoadedOnnx, load_onnx
from prunectl.channels.onnx.resize import prune_model, set_tensor
from prunectl.errors import UsageError, WorkError, first_line
from prunectl.formats.base import Array, ModelFile
from prunectl.formats.onnx.rewrite import relocated
from prunectl.formats.safe_json import require
from prunectl.pruning import destination as outputs
from prunectl.training.backend import LoadOptions
from prunectl.training.onnx.session import with_outputs

_MAX_MESSAGE_BYTES = (1 << 31) - 1
_FATAL = 4
_FLOATS = {1: np.float32, 10: np.float16, 11: np.float64}
_WHOLE = {2: np.uint8, 3: np.int8, 4: np.uint16, 5: np.int16, 6: np.int32, 7: np.int64, 9: np.bool_, 12: np.uint32}
"""Types of element, by their numbers in the format."""


def make_session(proto: Any, observed: Sequence[str]) -> Any:
    """A message in onnxruntime, some inner values among its outputs."""
    runtime = require("onnxruntime", extra="onnx")
    if proto.ByteSize() > _MAX_MESSAGE_BYTES:
        raise WorkError("a network of more than 2 GB cannot be proved to be the same, and is not cut")
    options = runtime.SessionOptions()
    options.log_severity_level = _FATAL
    try:
        message = with_outputs(proto, observed).SerializeToString()
        return runtime.InferenceSession(message, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise WorkError(
            f"the network cannot be loaded by onnxruntime: {first_line(error)}; nothing was written"
        ) from error


def random_input(port: Any, shape: Sequence[int], random: np.random.Generator) -> Array:
    """Random numbers for an input of a message."""
    element_type = port.type.tensor_type.elem_type
    if element_type in _FLOATS:
        return random.standard_normal(shape).astype(_FLOATS[element_type])
    if element_type not in _WHOLE:
        raise WorkError(f"the network takes an input, {port.name}, of which nothing random can be made")
    # Small enough for any table of words.
    return random.integers(0, 2, shape).astype(_WHOLE[element_type])


def read_onnx(model: ModelFile, origin: LoadOptions, data: Shapes | None = None) -> OnnxAdapter:
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
        self._omitted: frozenset[str] = frozenset()

    @property
    def graph(self) -> ChannelGraph:
        """What can be followed."""
        return self._loaded.graph

    @property
    def copied_from(self) -> Mapping[str, str]:
        """Shared lists of numbers that were given to each reader by itself."""
        return self._loaded.copied_from

    @property
    def omitted_tensors(self) -> frozenset[str]:
        """The zeros that recurrent layers began with: without a first state they begin so by themselves."""
        return self._omitted

    def prune(self, removed: RemovedIndices, after: PrunedShapes, weights: Mapping[str, Array]) -> Any:
        """The message of the smaller network."""
        pruned = prune_model(self._loaded, removed, after, weights)
        remaining = {name for name, _ in graph.tensors(pruned.graph)}
        self._omitted = frozenset(
            name for name, array in self.graph.weights.items() if name not in remaining and not array.any()
        )
        return pruned

    def with_weights(self, weights: Mapping[str, Array]) -> Any:
        """The message with some numbers replaced."""
        proto = type(self._loaded.proto)()
        proto.CopyFrom(self._loaded.proto)
        for name, slot in graph.tensors(proto.graph):
            if name in weights:
                set_tensor(slot, weights[name])
        return proto

    def random_inputs(self, random: np.random.Generator) -> Feeds:
        """Random inputs."""
        proto, shapes = self._loaded.proto, self._loaded.static.shapes
        ports = {port.name: port for port in proto.graph.input}
        return {name: random_input(ports[name], shapes[name], random) for name in self.graph.inputs}

    @property
    def has_float64(self) -> bool:
        """Never: onnxruntime convolves in float32 alone."""
        return False

    def runner(self, network: Any, observed: Iterable[str], *, in_float64: bool = False) -> Runner:
        """What onnxruntime makes of a message."""
        assert not in_float64
        names = tuple(observed)
        runtime = make_session(network, names)
        outputs = [port.name for port in network.graph.output]
        return lambda feeds: list(runtime.run([*outputs, *names], dict(feeds)))

    def write(self, network: Any, folder: Path, target: Path) -> Path:
        """Write a message, with the data beside it that was beside the original's."""
        onnx = require("onnx", extra="onnx")
        staged = outputs.staged_paths(self._model, folder, target)
        path = staged[self._model.path]
        for tensor in network.graph.initializer:
            if tensor.name in self._loaded.locations:
                location = self._loaded.locations[tensor.name]
                name = relocated(self._model, staged, location) or location
                onnx.external_data_helper.set_external_data(tensor, name)
        onnx.save_model(network, path)
        return path
