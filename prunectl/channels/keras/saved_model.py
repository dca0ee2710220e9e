"""The adapter of SavedModels of Keras 2: Keras converts them to HDF5, and saves the pruned network as a SavedModel."""

from __future__ import annotations

import shutil
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.channels.adapter import Feeds, GraphAdapter, PrunedShapes, RemovedIndices, Runner, WrittenNetwork
from prunectl.channels.graph import ChannelGraph
from prunectl.channels.keras import run as keras_run
from prunectl.channels.keras.adapter import KerasAdapter, require_followable
from prunectl.channels.keras.builder import LazyWeights
from prunectl.channels.keras.traverse import load_keras
from prunectl.channels.lengths import AxisLengths, DataShapes
from prunectl.errors import InputError, PrunectlError, WorkError, first_line
from prunectl.formats.base import Array, ModelFile, Role
from prunectl.formats.registry import open_model
from prunectl.formats.scratch import Scratch
from prunectl.formats.tensorflow import object_graph
from prunectl.formats.tensorflow.bundle import read_bundle
from prunectl.formats.tensorflow.graph_def import read_graph
from prunectl.formats.tensorflow.strip import SIGNATURES
from prunectl.formats.tensorflow.variables import VALUE_SUFFIX
from prunectl.pruning import destination as outputs
from prunectl.training import user_code
from prunectl.training.backend import LoadOptions
from prunectl.training.keras.backend import DevicePlacement
from prunectl.training.keras.load import LoadedModel, load
from prunectl.training.quiet import ignore_warnings

_WRITTEN_BY_KERAS = frozenset({"saved_model.pb", "keras_metadata.pb", "fingerprint.pb", "variables"})
_SAVE_AS_KERAS = "load it in Keras, save it as .keras, and prune that file"


def read_saved_model(model: ModelFile, origin: LoadOptions, data: DataShapes | None = None) -> SavedModelAdapter:
    """The adapter of a SavedModel with Keras metadata, which describes its layers."""
    if model.about.keras is None:
        raise InputError(
            f"{model.path} does not describe its Keras layers",
            hint="prune the model that it was exported from, as .keras, or export it to ONNX",
        )
    require_followable(model, origin)
    user_code.check(model, origin)
    _refuse_losses(model)
    return SavedModelAdapter(model, origin, AxisLengths(origin.inputs, data))


class SavedModelAdapter(GraphAdapter):
    """A SavedModel as a prunable graph."""

    def __init__(self, model: ModelFile, origin: LoadOptions, lengths: AxisLengths) -> None:
        self._model, self._origin = model, origin
        self._scratch_dir = Scratch()
        self._scratch = self._scratch_dir.path
        path = self._scratch / "model.h5"
        with self._with_original_name():
            with ignore_warnings():
                _save_with_keras(load(model, origin, DevicePlacement()), path)
            inner = open_model(path)
            self._loaded = load_keras(inner, lengths)
            self._names = _match_weights(model, inner)
            self._inner_names = {outer: name for name, outer in self._names.items()}
            self._inner = KerasAdapter(self._loaded, origin)

    @cached_property
    def graph(self) -> ChannelGraph:
        graph, names = self._inner.graph, self._names
        return replace(
            graph,
            weights=LazyWeights(
                [names[name] for name in graph.weights], lambda name: graph.weights[self._inner_names[name]]
            ),
            views={name: replace(view, tensor=names[view.tensor]) for name, view in graph.views.items()},
            uses={names[name]: count for name, count in graph.uses.items()},
        )

    @property
    def omitted_tensors(self) -> frozenset[str]:
        """The tensors that are not weights of layers: the state of the optimizer, of metrics and of losses."""
        return frozenset({tensor.name for tensor in self._model.tensors}.difference(self._names.values()))

    @property
    def notes(self) -> tuple[str, ...]:
        """A note on what the new SavedModel lacks."""
        if not self.omitted_tensors and not self._model.about.training:
            return ()
        return ("Keras rewrote the SavedModel without optimizer state, metrics and training configuration.",)

    @property
    def assumptions(self) -> tuple[str, ...]:
        """The assumed length of open axes, if some layers do not fit it."""
        return self._inner.assumptions

    @property
    def observable(self) -> frozenset[str]:
        """The outputs before the activation of layers that are called once."""
        return self._inner.observable

    def prune(self, removed: RemovedIndices, after: PrunedShapes, weights: Mapping[str, Array]) -> Any:
        """The smaller configuration, and sliced weights."""
        inner_removed = {(self._inner_names[name], axis): indices for (name, axis), indices in removed.items()}
        return self._inner.prune(inner_removed, after, self._renamed(weights))

    def with_weights(self, weights: Mapping[str, Array]) -> Any:
        return self._inner.with_weights(self._renamed(weights))

    def _renamed(self, weights: Mapping[str, Array]) -> dict[str, Array]:
        return {self._inner_names[name]: array for name, array in weights.items()}

    def random_inputs(self, random: np.random.Generator) -> Feeds:
        """Random inputs, small integers for embeddings."""
        return self._inner.random_inputs(random)

    def runner(self, network: Any, observed: Iterable[str], *, in_float64: bool = False) -> Runner:
        """A runner of the network that Keras loads from the edited file."""
        with self._with_original_name():
            return self._inner.runner(network, observed, in_float64=in_float64)

    def write(self, network: Any, folder: Path, target: Path) -> WrittenNetwork:
        """Let Keras save the smaller network as a SavedModel, and copy the files that Keras does not write."""
        staged = outputs.staged_paths(self._model, folder, target)
        staged_folder = staged[self._model.path / "saved_model.pb"].parent
        path = self._scratch / "small.h5"
        with self._with_original_name():
            keras_run.write(self._loaded, network, path)
            _save_with_keras(load(open_model(path), self._origin, DevicePlacement()), staged_folder)
        for source, staged_path in staged.items():
            if source.relative_to(self._model.path).parts[0] not in _WRITTEN_BY_KERAS:
                shutil.copyfile(source, staged_path)
        return WrittenNetwork(staged_folder)

    @contextmanager
    def _with_original_name(self) -> Generator[None]:
        """Replace the paths of scratch files in errors with the path of the user's model."""
        try:
            yield
        except PrunectlError as error:
            scratch_paths = [str(self._scratch / name) for name in ("model.h5", "small.h5")]
            message, hint = error.message, error.hint
            for name in scratch_paths:
                message, hint = message.replace(name, str(self._model.path)), hint.replace(name, str(self._model.path))
            raise type(error)(message, hint=hint) from error


def _save_with_keras(loaded: LoadedModel, path: Path) -> None:
    """Save a model without its optimizer, as HDF5 if the path ends in .h5, else as a SavedModel."""
    options = {"save_format": "h5" if path.suffix == ".h5" else "tf", "include_optimizer": False}
    try:
        with ignore_warnings():
            loaded.model.save(str(path), **options)
    except Exception as error:
        raise WorkError(
            f"Keras cannot save {loaded.file.path}: {first_line(error)}; nothing was written",
            hint=_SAVE_AS_KERAS,
        ) from error


def _refuse_losses(model: ModelFile) -> None:
    """Refuse a SavedModel with parts that Keras would leave out when it saves it again."""
    graph = read_graph(model.path / "saved_model.pb")
    signatures = sorted(set(graph.signatures) - SIGNATURES)
    lost = f"its signatures {', '.join(signatures)}" if signatures else ""
    lost = lost or ("the files that its graph reads" if graph.assets else "")
    lost = lost or ("all of its graphs but one" if len(graph.graphs) > 1 else "")
    if lost:
        raise InputError(f"{model.path} would lose {lost} when Keras saves it", hint=_SAVE_AS_KERAS)


def _match_weights(model: ModelFile, inner: ModelFile) -> dict[str, str]:
    """The name in the SavedModel of each weight in the HDF5 file that Keras converted it to."""
    names = object_graph.read(read_bundle(model.path / "variables" / "variables.index")).full_names
    tensors = {tensor.name: tensor for tensor in model.tensors}
    names_by_variable: dict[str, list[str]] = {}
    for name in tensors:
        names_by_variable.setdefault(names.get(f"{name}{VALUE_SUFFIX}", ""), []).append(name)
    matches = {}
    for tensor in inner.tensors:
        match names_by_variable.get(tensor.name.removesuffix(":0"), ()):
            case [name] if np.array_equal(model.read(tensors[name]), inner.read(tensor)):
                matches[tensor.name] = name
            case _:
                raise InputError(
                    f"the variables of {model.path} cannot be matched to {tensor.name}",
                    hint=_SAVE_AS_KERAS,
                )
    lost = [
        tensor.name
        for tensor in model.tensors
        if tensor.is_float and tensor.role is not Role.OPTIMIZER and tensor.name not in matches.values()
    ]
    if lost:
        raise InputError(f"{model.path} would lose {lost[0]}, which belongs to no layer", hint=_SAVE_AS_KERAS)
    return matches
