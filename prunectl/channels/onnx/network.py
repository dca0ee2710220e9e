"""An ONNX network that can be cut: its message in memory, run by onnxruntime."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.channels.after import After
from prunectl.channels.graph import Graph
from prunectl.channels.lengths import Lengths, Shapes
from prunectl.channels.onnx import views
from prunectl.channels.onnx.read import Opened, opened
from prunectl.channels.onnx.run import feed, session
from prunectl.channels.onnx.surgery import cut, put
from prunectl.channels.source import Feeds, Removed, Runner, made_by_weights
from prunectl.errors import UsageError
from prunectl.formats.base import Array, ModelFile
from prunectl.formats.onnx.write import relocated
from prunectl.formats.optional import require
from prunectl.pruning import output as outputs
from prunectl.training.network import Origin


def read(model: ModelFile, origin: Origin, data: Shapes | None = None) -> OnnxSource:
    """Return the network of an ONNX file, which needs nothing else but the lengths of axes that it leaves open."""
    for word, said in (("--model", origin.model), ("--custom-objects", origin.custom_objects)):
        if said:
            raise UsageError(
                f"{word} does not go with an ONNX file, which says all by itself", hint=f"leave out {word}"
            )
    return OnnxSource(model, opened(model, Lengths(origin.inputs, data)))


class OnnxSource:
    """An ONNX model, as cutting sees it."""

    def __init__(self, model: ModelFile, source: Opened) -> None:
        self._model = model
        self._opened = source
        self._dropped: frozenset[str] = frozenset()

    @property
    def graph(self) -> Graph:
        """What can be followed."""
        return self._opened.graph

    @property
    def copies(self) -> Mapping[str, str]:
        """Shared lists of numbers that were given to each reader by itself."""
        return self._opened.copies

    @property
    def followers(self) -> Mapping[str, str]:
        """Nothing: an ONNX file holds no state of an optimizer."""
        return {}

    @property
    def dropped(self) -> frozenset[str]:
        """The zeros that recurrent layers began with: without a first state they begin so by themselves."""
        return self._dropped

    @property
    def notes(self) -> tuple[str, ...]:
        """Nothing that the file does not say."""
        return ()

    @property
    def doubts(self) -> tuple[str, ...]:
        """Nothing: what does not fit is refused."""
        return ()

    @property
    def showable(self) -> frozenset[str]:
        """What every operation with a kernel makes."""
        return made_by_weights(self.graph)

    def beside(self, target: Path) -> tuple[Path, ...]:
        """Return nothing: data beside the model is known by its handler."""
        del target
        return ()

    def cut(self, removed: Removed, after: After, weights: Mapping[str, Array]) -> Any:
        """Return the message of the smaller network."""
        smaller = cut(self._opened, removed, after, weights)
        left = {name for name, _ in views.tensors(smaller.graph)}
        self._dropped = frozenset(
            name for name, array in self.graph.weights.items() if name not in left and not array.any()
        )
        return smaller

    def with_weights(self, weights: Mapping[str, Array]) -> Any:
        """Return the message with some numbers replaced."""
        proto = type(self._opened.proto)()
        proto.CopyFrom(self._opened.proto)
        for name, slot in views.tensors(proto.graph):
            if name in weights:
                put(slot, weights[name])
        return proto

    def feeds(self, random: np.random.Generator) -> Feeds:
        """Return random inputs."""
        proto, shapes = self._opened.proto, self._opened.known.shapes
        ports = {port.name: port for port in proto.graph.input}
        return {name: feed(ports[name], shapes[name], random) for name in self.graph.inputs}

    @property
    def has_float64(self) -> bool:
        """Never: onnxruntime convolves in float32 alone."""
        return False

    def runner(self, network: Any, shown: Iterable[str], *, is_wide: bool = False) -> Runner:
        """Return what onnxruntime makes of a message."""
        assert not is_wide
        names = tuple(shown)
        runtime = session(network, names)
        outputs = [port.name for port in network.graph.output]
        return lambda feeds: list(runtime.run([*outputs, *names], dict(feeds)))

    def write(self, network: Any, folder: Path, target: Path) -> Path:
        """Write a message, with the data beside it that was beside the original's."""
        onnx = require("onnx", extra="onnx")
        places = outputs.places(self._model, folder, target)
        written = places[self._model.path]
        for tensor in network.graph.initializer:
            if tensor.name in self._opened.locations:
                location = self._opened.locations[tensor.name]
                name = relocated(self._model, places, location) or location
                onnx.external_data_helper.set_external_data(tensor, name)
        onnx.save_model(network, written)
        return written
