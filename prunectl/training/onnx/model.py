"""ONNX models for calibration: predictions, and the layer inputs of weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

import numpy as np

from prunectl.errors import InputError
from prunectl.formats.base import Array, ModelFile
from prunectl.training.backend import InputCallback, LayerInput, ModelSignature
from prunectl.training.data.source import Arrays
from prunectl.training.onnx import session
from prunectl.training.onnx.layer_inputs import InputCapture, capture_rule
from prunectl.training.onnx.session import (
    LoadedWeights,
    PaddedBatch,
    Session,
    WeightSite,
    join_outputs,
    split_batches,
    weight_sites,
)

_FLOAT32 = np.dtype(np.float32)


class OnnxModel:
    """A model in onnxruntime, on the CPU."""

    def __init__(self, model: ModelFile) -> None:
        self._weights = weights = LoadedWeights(model)
        self._graph = weights.proto.graph
        self._sites = weight_sites(weights)
        self._computed = {name for node in self._graph.node for name in node.output}
        self._size = session.fixed_batch_size(self._graph)
        self._predicting: Session | None = Session(weights)
        self._observing: tuple[frozenset[str], Session] | None = None

    @property
    def signature(self) -> ModelSignature:
        return session.signature(self._graph)

    @property
    def notes(self) -> tuple[str, ...]:
        """A note if the model accepts only one batch size."""
        if self._size is None:
            return ()
        examples = "1 example" if self._size == 1 else f"{self._size} examples"
        return (f"{self._weights.model.path.name} accepts {examples} at a time: batches are split accordingly",)

    def observe(self, names: Collection[str], x: Arrays, callback: InputCallback) -> None:
        captures = [
            (site.name, capture) for site in self._sites if site.name in names for capture in self._captures(site)
        ]
        needs = {need for _, capture in captures for need in capture.needs}
        for batch in self._batches(x):
            values = {name: _as_float32(value) for name, value in self._values(needs, batch.feeds).items()}
            for name, capture in captures:
                for inputs, use in capture.compute(batch.run_values(values)):
                    callback(LayerInput(name, np.asarray(inputs, _FLOAT32), use))

    def predict(self, x: Arrays) -> Arrays:
        if self._predicting is None:
            self._predicting = Session(self._weights)
        names = [port.name for port in session.array_outputs(self._graph)]
        if not names:
            raise InputError(f"{self._weights.model.path} cannot be used: none of its outputs is an array of numbers")
        runs = [(batch, self._predicting.run(names, batch.feeds)) for batch in self._batches(x)]
        outputs = tuple(self._joined(name, [(batch, values[name]) for batch, values in runs]) for name in names)
        return outputs if len(outputs) > 1 else outputs[0]

    def assign(self, values: Mapping[str, Array]) -> None:
        self._weights.assign(values)
        self._predicting = self._observing = None

    def weights(self, names: Iterable[str]) -> dict[str, Array]:
        return self._weights.copies(names)

    def tensors(self) -> dict[str, Array]:
        return self._weights.copies()

    def _captures(self, site: WeightSite) -> Iterator[InputCapture]:
        """Yield the capture of a site, if it has a rule, its input is data, and all values that it needs exist."""
        capture = capture_rule(site)
        known = self._computed | self._weights.names | {port.name for port in self._graph.input}
        if capture is not None and capture.needs[0] not in self._weights.names and known.issuperset(capture.needs):
            yield capture

    def _values(self, names: Collection[str], feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Values of the graph by name: inputs, tensors, or computed values."""
        inner = frozenset(names) & self._computed
        known = {name: feeds[name] if name in feeds else self._weights.value(name) for name in set(names) - inner}
        if not inner:
            return known
        if self._observing is None or self._observing[0] != inner:
            self._observing = None
            self._observing = (inner, Session(self._weights, inner))
        return known | self._observing[1].run(sorted(inner), feeds)

    def _batches(self, x: Arrays) -> Iterable[PaddedBatch]:
        return split_batches(session.feeds(self._graph, x, is_any_count=self._size is not None), self._size)

    def _joined(self, name: str, outputs: list[tuple[PaddedBatch, Array]]) -> Array:
        array = join_outputs(outputs)
        if array is None:
            raise InputError(
                f"{self._weights.model.path} accepts {self._size} examples at a time, "
                f"but its output {name!r} has no batch axis"
            )
        return array


def _as_float32(value: Array) -> Array:
    return value.astype(_FLOAT32, copy=False) if value.dtype.kind == "f" or value.dtype.name == "bfloat16" else value
