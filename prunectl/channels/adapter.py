"""The adapter between structured pruning and a framework: its interface, and the table of adapters by file format."""

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
    """The shapes of all values after the removal of channels."""

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
        """The number of kept indices in front of an offset on an axis."""
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
"""The removed indices, by weight and axis."""
Axes = Mapping[int, LabelArray]
"""The removed indices of one weight, by axis."""
Feeds = Mapping[str, Array]
Runner = Callable[[Feeds], list[Any]]
"""From inputs by name to the outputs of the network, followed by the observed inner values."""
_WEIGHTED_KINDS = frozenset({OpKind.CONVOLUTION, OpKind.LINEAR, OpKind.RECURRENT})


@dataclass(frozen=True, slots=True)
class WrittenNetwork:
    """A network on disk, and facts that became known only while it was pruned and written."""

    path: Path
    notes: tuple[str, ...] = ()
    """Sentences for the user."""
    omitted_tensors: frozenset[str] = frozenset()
    """Tensors of the original file that the smaller network does not need."""


class GraphAdapter(ABC):
    """A network of one framework: traced as a graph, pruned, run, and written.

    `prune` and `with_weights` return a network in the framework's own representation; `runner` and `write` take it.
    The defaults of this class suit most frameworks.
    """

    @property
    @abstractmethod
    def graph(self) -> ChannelGraph:
        """The operations; weights have the names that they have in the file."""

    @property
    def copied_from(self) -> Mapping[str, str]:
        """For each weight of the graph that the adapter copied, the tensor of the file that it was copied from."""
        return {}

    @property
    def coupled_tensors(self) -> Mapping[str, str]:
        """Tensors of the file that are cut like a weight, such as optimizer state; with the name of that weight."""
        return {}

    @property
    def omitted_tensors(self) -> frozenset[str]:
        """Tensors of the file that are left out on purpose; `notes` tells the user."""
        return frozenset()

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for the user about the written file."""
        return ()

    @property
    def assumptions(self) -> tuple[str, ...]:
        """Guesses that affected the result, each with the option that overrides it."""
        return ()

    @property
    def length_hint(self) -> str:
        """A hint on how to give the lengths of open axes, where assumed lengths may be wrong."""
        return "\n".join(self.assumptions)

    @property
    def observable(self) -> frozenset[str]:
        """The inner values that `runner` can record: outputs of convolutions and dense layers, as far as possible."""
        return outputs_of_weighted_layers(self.graph)

    @property
    def has_float64(self) -> bool:
        """Whether the runtime can run the network in float64, even if its own precision is lower."""
        return True

    @property
    def class_name(self) -> str:
        """The class that is written in a companion file; empty if there is none."""
        return ""

    def companion_files(self, target: Path) -> tuple[Path, ...]:
        """The files that are written beside the output file `target`."""
        del target
        return ()

    @abstractmethod
    def prune(self, removed: RemovedIndices, after: PrunedShapes, weights: Mapping[str, Array]) -> Any:
        """The network without the removed channels; `weights` are new values that some weights get before the cut."""

    @abstractmethod
    def with_weights(self, weights: Mapping[str, Array]) -> Any:
        """The original network with new values for some weights."""

    @abstractmethod
    def random_inputs(self, random: np.random.Generator) -> Feeds:
        """Random inputs of the shapes that the graph was traced with."""

    @abstractmethod
    def runner(self, network: Any, observed: Iterable[str], *, in_float64: bool = False) -> Runner:
        """A function that runs a network in its own runtime, and records inner values by their names in the graph.

        It returns the outputs, then one value for each name in `observed`, in that order and with the axes of the
        graph. All names must be in `observable`. WorkError if the runtime cannot load the network.
        """

    def to_float64(self, built: Runner, network: Any, observed: Iterable[str]) -> Runner:
        """A float64 runner that replaces `built`, a runner of the same network, which must not be used afterwards."""
        del built
        return self.runner(network, observed, in_float64=True)

    @abstractmethod
    def write(self, network: Any, folder: Path, target: Path) -> WrittenNetwork:
        """Write a network into the scratch folder, under the file names of the target."""


def outputs_of_weighted_layers(graph: ChannelGraph) -> frozenset[str]:
    """The outputs of convolutions, dense and recurrent layers."""
    return frozenset(node.outputs[0] for node in graph.nodes if node.kind in _WEIGHTED_KINDS)


def removed_by_tensor(removed: RemovedIndices) -> dict[str, dict[int, LabelArray]]:
    """The removed indices of each axis, grouped by weight."""
    by_tensor: dict[str, dict[int, LabelArray]] = {}
    for (name, axis), indices in removed.items():
        by_tensor.setdefault(name, {})[axis] = indices
    return by_tensor


def pruned_shape(name: str, shape: Iterable[int], removed: RemovedIndices) -> tuple[int, ...]:
    """The shape of a weight after the removal."""
    return tuple(length - len(removed.get((name, axis), ())) for axis, length in enumerate(shape))


def delete_indices(array: Array, axes: Axes) -> Array:
    """A copy of a weight without the given indices."""
    for axis, indices in axes.items():
        array = np.delete(array, indices, axis)
    return array


@dataclass(frozen=True, slots=True)
class Frontend:
    """An adapter, and the file formats that it reads."""

    name: str
    formats: frozenset[str]
    reader: str
    """`module:function` in this package; the function makes an adapter from a model, load options and data shapes."""
    needs: str = ""
    """The framework that the module imports; the extra that installs it has the same name."""


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
    """The adapter for the format of a model; `data` gives the lengths of axes that the file leaves open."""
    for frontend in FRONTENDS:
        if model.format in frontend.formats:
            if frontend.needs:
                from prunectl.training import user_code  # noqa: PLC0415 - it handles the code of all formats

                # The other adapters trace without their framework; they check user code before they import it.
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
