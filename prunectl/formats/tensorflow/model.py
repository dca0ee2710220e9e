"""Opening of TensorFlow SavedModels (a folder with a graph and a bundle of variables) and checkpoints (a bundle)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prunectl.errors import InputError
from prunectl.formats import budgets
from prunectl.formats.base import ModelFile, ModelInfo, PruningWrapper, Role, Tensor
from prunectl.formats.extents import file_states
from prunectl.formats.keras import config as keras_config
from prunectl.formats.keras.config import PRUNED_PREFIX, object_in, schedule, string_in
from prunectl.formats.protobuf import WireError
from prunectl.formats.safe_json import parse_object, refuse_too_much
from prunectl.formats.tensorflow import object_graph, variables
from prunectl.formats.tensorflow.bundle import Bundle, read_bundle
from prunectl.formats.tensorflow.graph_def import (
    KerasObject,
    SavedGraph,
    constants,
    read_graph,
    read_keras_metadata,
)

_MODELS = frozenset({"_tf_keras_model", "_tf_keras_sequential", "_tf_keras_network"})
_NOT_LAYERS = frozenset({"_tf_keras_metric", "_tf_keras_input_layer"})


@dataclass(frozen=True, slots=True)
class KerasFacts:
    """Facts gathered from the Keras objects of a SavedModel."""

    classes: Mapping[str, str]
    """Class of each layer, by its name."""
    model: Mapping[str, Any] | None
    """The configuration of the whole model."""
    version: str
    optimizer: str
    training: tuple[str, ...]
    wrappers: tuple[PruningWrapper, ...]
    code: tuple[str, ...]


def read_facts(path: Path, objects: Iterable[KerasObject]) -> KerasFacts:
    """Gather the facts of the Keras objects."""
    classes: dict[str, str] = {}
    model: Mapping[str, Any] = {}
    wrappers: dict[PruningWrapper, None] = {}
    code: dict[str, None] = {}
    keras_objects = [entry for entry in objects if entry.identifier.startswith("_tf_keras") and entry.metadata]
    refuse_too_much(
        (entry.metadata for entry in keras_objects), path, "its Keras metadata", budgets.MAX_KERAS_OBJECT_BYTES
    )
    for entry in keras_objects:
        metadata = parse_object(entry.metadata, path, "its Keras metadata")
        name, kind = string_in(metadata, "name"), string_in(metadata, "class_name")
        if entry.identifier in _MODELS:
            model = model or metadata
        elif entry.identifier not in _NOT_LAYERS and kind != "PruneLowMagnitude":
            classes.setdefault(name, kind)
        if kind == "PruneLowMagnitude":
            tfmot_schedule = schedule(object_in(object_in(metadata, "config"), "pruning_schedule"))
            wrappers[PruningWrapper("tfmot", name.removeprefix(PRUNED_PREFIX), tfmot_schedule)] = None
        if kind == "Lambda":
            code[f"Lambda layer {name}"] = None
        elif ">" in kind:
            code[f"custom class {kind.rpartition('>')[2]}"] = None
    training = object_in(model, "training_config")
    return KerasFacts(
        classes=classes,
        model=keras_config.size_checked(
            {"class_name": model["class_name"], "config": model["config"]} if _has_config(model) else None, path
        ),
        version=string_in(model, "keras_version"),
        optimizer=keras_config.optimizer(training),
        training=keras_config.training(training),
        wrappers=tuple(wrappers),
        code=tuple(code),
    )


def _has_config(model: Mapping[str, Any]) -> bool:
    return "class_name" in model and bool(object_in(model, "config"))


_RUNS_GRAPHS = "Loading this SavedModel runs only the operations of its graph, unless Keras rebuilds its layers."


def open_saved_model(path: Path) -> ModelFile:
    """Open a SavedModel by its folder."""
    files = _files(path)
    states = file_states(files)
    graph = read_graph(path / "saved_model.pb")
    metadata = path / "keras_metadata.pb"
    # Keras 2.5 moved its metadata out of saved_model.pb into a file of its own.
    keras = read_facts(
        *((metadata, read_keras_metadata(metadata)) if metadata.is_file() else (graph.path, graph.objects))
    )
    index = path / "variables" / "variables.index"
    bundle = read_bundle(index) if index.is_file() else None
    if bundle is None or not bundle.numbers():
        return replace(_frozen(path, graph, keras, files, has_index=bundle is not None), states=states)
    objects = object_graph.read(bundle)
    names = objects.full_names
    tensors = variables.tensors_of(bundle, objects, keras.classes)
    copies = variables.copies(bundle, names)
    return ModelFile(
        path=path,
        format="saved-model",
        tensors=tensors,
        about=_about(
            graph,
            keras,
            optimizer=keras.optimizer or variables.optimizer(tensors, names),
            note=_duplicates_note(tensors, copies) or _zeroed_note(bundle),
        ),
        files=files,
        decode=variables.decoder(bundle),
        duplicates=copies,
        states=states,
    )


def _frozen(path: Path, graph: SavedGraph, keras: KerasFacts, files: tuple[Path, ...], *, has_index: bool) -> ModelFile:
    """A model without variables: its weights, if any, are constants of the graph."""
    if not has_index and any(".data-" in file.name and file.parent.name == "variables" for file in files):
        raise InputError(f"{path} is incomplete: it has data, but no variables.index")
    try:
        tensors, copies = constants(graph)
    except WireError as error:
        raise InputError(f"{graph.path} is damaged: its graph holds {error}") from error
    note = (
        "The model has no variables: its weights are constants of the graph."
        if tensors
        else "The model has neither variables nor weights in its graph."
    )
    return ModelFile(
        path=path,
        format="saved-model",
        tensors=tensors,
        about=_about(graph, keras, optimizer="", note=note),
        files=files,
        duplicates=copies,
    )


def _about(graph: SavedGraph, keras: KerasFacts, *, optimizer: str, note: str) -> ModelInfo:
    producer = f"tensorflow {graph.version}" if graph.version else "tensorflow"
    graphs_note = f"The file holds {len(graph.graphs)} graphs for different uses." if len(graph.graphs) > 1 else ""
    return ModelInfo(
        producer=f"{producer}, keras {keras.version}" if keras.version else producer,
        wrappers=keras.wrappers,
        optimizer=optimizer,
        training=keras.training,
        code=keras.code,
        code_bytes=sum(definition.value for definition in graph.graphs),
        notes=tuple(filter(None, (note, graphs_note, _RUNS_GRAPHS if keras.code else ""))),
        keras=keras.model,
    )


def _duplicates_note(tensors: Iterable[Tensor], copies: Mapping[str, str]) -> str:
    nbytes = sum(tensor.nbytes for tensor in tensors if tensor.name in copies)
    return f"The file holds some variables twice, as Keras 3 exports them: {nbytes} bytes are copies." if nbytes else ""


def _zeroed_note(bundle: Bundle) -> str:
    leaders = {entry.key: entry.nbytes for entry in bundle.shared.values()}
    if not leaders:
        return ""
    nbytes = sum(leaders.values())
    return f"The optimizer state is stripped: its variables, which the graph still reads, are {nbytes} bytes of zeros."


def _files(path: Path) -> tuple[Path, ...]:
    """Every file of the folder, without following links to other folders."""
    files: list[Path] = []
    pending, count = [path], 0
    while pending:
        try:
            children = list(pending.pop().iterdir())
        except OSError as error:
            raise InputError(f"{path} cannot be listed: {error.strerror}") from error
        count += len(children)
        if count > budgets.MAX_FILES:
            raise InputError(f"{path} is refused: it holds more than {budgets.MAX_FILES} files")
        files.extend(child for child in children if child.is_file())
        pending.extend(child for child in children if child.is_dir() and not child.is_symlink())
    return tuple(sorted(files))


def open_checkpoint(path: Path) -> ModelFile:
    """Open a checkpoint by its index."""
    bundle = read_bundle(path)
    objects = object_graph.read(bundle)
    names = objects.full_names
    tensors = variables.tensors_of(bundle, objects, {})
    pruned = dict.fromkeys(tensor.layer for tensor in tensors if tensor.role in {Role.MASK, Role.SCHEDULE})
    return ModelFile(
        path=path,
        format="tf-checkpoint",
        tensors=tensors,
        about=ModelInfo(
            producer="tensorflow 2" if names else "tensorflow",
            wrappers=tuple(PruningWrapper("tfmot", layer) for layer in pruned),
            optimizer=variables.optimizer(tensors, names),
        ),
        files=(path, *bundle.shards.values()),
        decode=variables.decoder(bundle),
    )
