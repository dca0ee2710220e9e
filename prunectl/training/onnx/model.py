"""From an ONNX file to a model that shows what its weights meet."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import numpy as np

from prunectl.errors import InputError
from prunectl.formats.base import Array, ModelFile
from prunectl.formats.safe_json import require
from prunectl.training.backend import LoadOptions, ModelSignature
from prunectl.training.data.source import Arrays
from prunectl.training.layer_inputs import InputCallback, InspectableModel, LayerInput
from prunectl.training.onnx import session
from prunectl.training.onnx.layer_inputs import capture_rule
from prunectl.training.onnx.session import PaddedBatch, Session, join_outputs, split_batches
from prunectl.training.onnx.uses import InputCapture, LoadedWeights, load_weights, weight_sites

_REAL = np.dtype(np.float32)


class OnnxModel:
    """A model in onnxruntime, on the processor."""

    def __init__(self, held: LoadedWeights) -> None:
        self._held = held
        self._graph = held.proto.graph
        self._sites = weight_sites(held)
        self._made = {name for node in self._graph.node for name in node.output}
        self._size = session.fixed_batch_size(self._graph)
        self._predicting: Session | None = Session(held)
        self._observing: tuple[frozenset[str], Session] | None = None

    @property
    def signature(self) -> ModelSignature:
        """What goes in and comes out, as far as the graph says."""
        return session.signature(self._graph)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about how it is run."""
        if self._size is None:
            return ()
        some = "1 example" if self._size == 1 else f"{self._size} examples"
        return (f"{self._held.model.path.name} takes {some} at a time: each batch goes through in such pieces",)

    def observe(self, names: Collection[str], x: Arrays, see: InputCallback) -> None:
        """Run one batch through, and show every time that one of these tensors meets inputs."""
        sites = [site for site in self._sites if site.name in names]
        looks = [(site.name, found) for site in sites if (found := self._told(capture_rule(site)))]
        needs = {need for _, found in looks for need in found.needs}
        for piece in self._pieces(x):
            values = {name: _real(value) for name, value in self._values(needs, piece.feeds).items()}
            for name, found in looks:
                for inputs, use in found.show(piece.left(values)):
                    see(LayerInput(name, np.asarray(inputs, _REAL), use))

    def predict(self, x: Arrays) -> Arrays:
        """What comes out, for one batch."""
        if self._predicting is None:
            self._predicting = Session(self._held)
        names = [port.name for port in self._graph.output]
        ran = [(piece, self._predicting.run(names, piece.feeds)) for piece in self._pieces(x)]
        found = tuple(self._joined(name, [(piece, values[name]) for piece, values in ran]) for name in names)
        return found if len(found) > 1 else found[0]

    def assign(self, values: Mapping[str, Array]) -> None:
        """Replace the numbers of some tensors."""
        self._held.assign(values)
        self._predicting = self._observing = None

    def weights(self, names: Iterable[str]) -> dict[str, Array]:
        """Copies of some tensors."""
        return self._held.copies(names)

    def tensors(self) -> dict[str, Array]:
        """Copies of all tensors."""
        return self._held.copies()

    def _told(self, found: InputCapture | None) -> InputCapture | None:
        """A way to see something through which data goes, and whose values the graph has."""
        if found is None or found.needs[0] in self._held.weights:
            return None
        known = self._made | self._held.weights | {port.name for port in self._graph.input}
        return found if known.issuperset(found.needs) else None

    def _values(self, names: Collection[str], feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Values of the graph: what goes in, what is made in it, what stands in tensors."""
        inner = frozenset(names) & self._made
        known = {name: feeds[name] if name in feeds else self._held.value(name) for name in set(names) - inner}
        if not inner:
            return known
        if self._observing is None or self._observing[0] != inner:
            self._observing = None
            self._observing = (inner, Session(self._held, inner))
        return known | self._observing[1].run(sorted(inner), feeds)

    def _pieces(self, x: Arrays) -> Iterable[PaddedBatch]:
        return split_batches(session.feeds(self._graph, x, is_any_count=self._size is not None), self._size)

    def _joined(self, name: str, found: list[tuple[PaddedBatch, Array]]) -> Array:
        array = join_outputs(found)
        if array is None:
            raise InputError(
                f"{self._held.model.path} takes {self._size} examples at a time, "
                f"and its output {name!r} does not tell one from another"
            )
        return array


def _real(value: Array) -> Array:
    return value.astype(_REAL, copy=False) if value.dtype.kind == "f" or value.dtype.name == "bfloat16" else value


def load_onnx_model(model: ModelFile, origin: LoadOptions) -> InspectableModel:
    """A model as onnxruntime runs it; the file says all of it, so that nothing of its origin is asked."""
    del origin
    require("onnx", extra="onnx")
    require("onnxruntime", extra="onnx")
    return OnnxModel(load_weights(model))
