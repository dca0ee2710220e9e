"""A network in its own graph language, as structured pruning needs it: the interface, and who speaks which language."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.channels.graph import ChannelGraph, OpKind
from prunectl.channels.labels import LabelArray, LabelTrace
from prunectl.channels.lengths import DataShapes
from prunectl.errors import InputError
from prunectl.formats.base import Array, ModelFile
from prunectl.formats.safe_json import require
from prunectl.pruning.masks import Mask
from prunectl.training.backend import LoadOptions


class PrunedShapes:
    """The shapes of all values after channels were removed."""

    def __init__(self, trace: LabelTrace, removed_labels: Iterable[int]) -> None:
        self.trace = trace
        self._removed = np.array(sorted(removed_labels), np.int64)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a value after the removal."""
        before, labels = self.trace.shape(name), self.trace.labels_of(name)
        after = list(before)
        for axis in self.trace.labels.varying(labels):
            line = self.trace.labels.along(labels, axis)
            if line is not None:
                after[axis] = int(self._kept(line).sum())
        return tuple(after)

    def num_kept_before(self, name: str, axis: int, offset: int) -> int:
        """The number of kept indices of an axis before an offset."""
        labels = self.trace.labels_of(name)
        line = self.trace.labels.along(labels, axis)
        if line is None:
            return offset
        return int(self._kept(line[:offset]).sum())

    def slice_value(self, name: str, array: Array) -> Array:
        """A value of the original network without the removed channels."""
        labels = self.trace.labels_of(name)
        for axis in self.trace.labels.varying(labels):
            line = self.trace.labels.along(labels, axis)
            if line is not None:
                array = np.compress(self._kept(line), array, axis)
        return array

    def _kept(self, line: LabelArray) -> Mask:
        return ~np.isin(self.trace.labels.roots(line), self._removed)

    def has_changed(self, name: str) -> bool:
        """Whether a value lost channels."""
        is_known = name in self.trace.values and name in self.trace.graph.shapes
        return is_known and self.shape(name) != self.trace.shape(name)


RemovedIndices = Mapping[tuple[str, int], LabelArray]
"""The indices that go, by weight and axis."""
Axes = Mapping[int, LabelArray]
"""The indices that go from one weight, by axis."""
Feeds = Mapping[str, Array]
Runner = Callable[[Feeds], list[Any]]
"""From inputs by name to what comes out, and then what was asked to be shown besides."""
_WEIGHTED_KINDS = frozenset({OpKind.CONVOLUTION, OpKind.LINEAR, OpKind.RECURRENT})


@dataclass(frozen=True, slots=True)
class WrittenNetwork:
    """A network on disk, and what only came up while it was cut and written."""

    path: Path
    notes: tuple[str, ...] = ()
    """What a user should know."""
    omitted_tensors: frozenset[str] = frozenset()
    """Tensors of the file that the smaller network has no use for."""


class GraphAdapter(ABC):
    """A network in its own graph language: read as a graph, pruned, run, and written.

    Networks are handed about as the language has them in memory: what `prune` and `with_weights` return, `runner` and
    `write` take. What most languages share is said here once.
    """

    @property
    @abstractmethod
    def graph(self) -> ChannelGraph:
        """The operations; weights are called what the file calls them."""

    @property
    def copied_from(self) -> Mapping[str, str]:
        """The original of each weight that is in the graph but not in the file."""
        return {}

    @property
    def coupled_tensors(self) -> Mapping[str, str]:
        """Tensors of the file that are cut as a weight is, such as the state of an optimizer, by the weight's name."""
        return {}

    @property
    def omitted_tensors(self) -> frozenset[str]:
        """Tensors of the file that are left out on purpose; `notes` says so."""
        return frozenset()

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for the user about what is written."""
        return ()

    @property
    def assumptions(self) -> tuple[str, ...]:
        """Guesses that made a difference, each with the option that replaces it."""
        return ()

    @property
    def length_hint(self) -> str:
        """How to give the lengths of open axes, where some were assumed that may not fit."""
        return "\n".join(self.assumptions)

    @property
    def observable(self) -> frozenset[str]:
        """The inner values that `runner` can record: outputs of convolutions and dense layers, as far as possible."""
        return outputs_of_weighted_layers(self.graph)

    @property
    def has_float64(self) -> bool:
        """Whether its runtime can calculate in float64, whatever the network itself does."""
        return True

    @property
    def class_name(self) -> str:
        """The class that is written beside the weights; empty where none is."""
        return ""

    def companion_files(self, target: Path) -> tuple[Path, ...]:
        """The files that are written beside a target."""
        del target
        return ()

    @abstractmethod
    def prune(self, removed: RemovedIndices, after: PrunedShapes, weights: Mapping[str, Array]) -> Any:
        """Remove channels; some weights have other numbers before they are cut."""

    @abstractmethod
    def with_weights(self, weights: Mapping[str, Array]) -> Any:
        """The network as it was read, some of its numbers replaced."""

    @abstractmethod
    def random_inputs(self, random: np.random.Generator) -> Feeds:
        """Random inputs of the shapes that the graph was traced with."""

    @abstractmethod
    def runner(self, network: Any, observed: Iterable[str], *, in_float64: bool = False) -> Runner:
        """A function that runs a network in its own runtime, and records inner values by their names in the graph.

        Outputs come first, then one value for each name, in their order and as the graph has their axes. All names are
        observable. WorkError if the runtime cannot load it.
        """

    def widened(self, built: Runner, network: Any, observed: Iterable[str]) -> Runner:
        """A runner in float64 in place of the one of the same network, which cannot be used after that."""
        del built
        return self.runner(network, observed, in_float64=True)

    @abstractmethod
    def write(self, network: Any, folder: Path, target: Path) -> WrittenNetwork:
        """Write a network into a scratch folder, under the names that belong to a target."""


def outputs_of_weighted_layers(graph: ChannelGraph) -> frozenset[str]:
    """The outputs of convolutions, dense and recurrent layers."""
    return frozenset(node.outputs[0] for node in graph.nodes if node.kind in _WEIGHTED_KINDS)


def removed_by_tensor(removed: RemovedIndices) -> dict[str, dict[int, LabelArray]]:
    """The indices that go from each axis, by weight."""
    by_tensor: dict[str, dict[int, LabelArray]] = {}
    for (name, axis), indices in removed.items():
        by_tensor.setdefault(name, {})[axis] = indices
    return by_tensor


def pruned_shape(name: str, shape: Iterable[int], removed: RemovedIndices) -> tuple[int, ...]:
    """The shape of a weight after the removal."""
    return tuple(length - len(removed.get((name, axis), ())) for axis, length in enumerate(shape))


def delete_indices(array: Array, axes: Axes) -> Array:
    """A weight without some indices of some axes."""
    for axis, indices in axes.items():
        array = np.delete(array, indices, axis)
    return array


@dataclass(frozen=True, slots=True)
class Frontend:
    """A graph language, and the formats whose files speak it."""

    name: str
    formats: frozenset[str]
    reader: str
    """`module:function` in this package that makes a source of a model, its origin and the shapes of data."""
    needs: str = ""
    """The package that this module imports, which is called as the extra that brings it."""


FRONTENDS = (
    Frontend("ONNX", frozenset({"onnx"}), "onnx.adapter:read_onnx"),
    Frontend("Keras", frozenset({"keras-h5", "keras"}), "keras.adapter:read_keras"),
    Frontend("TensorFlow SavedModel", frozenset({"saved-model"}), "keras.saved_model:read_saved_model"),
    Frontend(
        "PyTorch",
        frozenset({"torch", "torch-legacy", "torch-export", "safetensors"}),
        "torch.adapter:read_torch",
        "torch",
    ),
)


def open_adapter(model: ModelFile, origin: LoadOptions, data: DataShapes | None = None) -> GraphAdapter:
    """The adapter of the graph language that a file is written in.

    What data goes in tells how long the axes are that a file leaves open.
    """
    for frontend in FRONTENDS:
        if model.format in frontend.formats:
            if frontend.needs:
                from prunectl.training import user_code  # noqa: PLC0415 - it knows the code of all formats

                # The others are followed without their framework, and ask before they load it.
                user_code.check(model, origin)
                user_code.require_network(model, origin)
                require(frontend.needs, extra=frontend.needs)
            module, _, name = frontend.reader.partition(":")
            adapter: GraphAdapter = getattr(importlib.import_module(f"prunectl.channels.{module}"), name)(
                model, origin, data
            )
            return adapter
    names = ", ".join(frontend.name for frontend in FRONTENDS)
    raise InputError(
        f"{model.path}: channels can be pruned only in files of {names}", hint="export the model to ONNX first"
    )
