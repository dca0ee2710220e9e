"""TensorFlow SavedModels (a folder of a graph and a bundle of variables) and checkpoints (a bundle): open and strip."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunectl.errors import InputError, UsageError
from prunectl.formats import budgets
from prunectl.formats.base import (
    WRAPPING,
    ModelFile,
    ModelInfo,
    PruningWrapper,
    RemovedItem,
    Role,
    StripOptions,
    StripPart,
    Tensor,
)
from prunectl.formats.keras import config as keras_config
from prunectl.formats.keras.config import PRUNED_PREFIX, part, schedule, text
from prunectl.formats.patch import patch_files
from prunectl.formats.protobuf import WireError
from prunectl.formats.safe_json import parse_object, refuse_too_much
from prunectl.formats.tensorflow import object_graph, unwrap, variables
from prunectl.formats.tensorflow.bundle import Bundle, BundleEntry, read_bundle
from prunectl.formats.tensorflow.bundle_write import BundleEdits, rewrite_bundle
from prunectl.formats.tensorflow.graph_def import (
    KerasObject,
    SavedGraph,
    constants,
    read_graph,
    read_keras_metadata,
    variables_used_by_functions,
)
from prunectl.formats.tensorflow.object_graph import find_ownership
from prunectl.formats.tensorflow.unwrap import storage_keys, training_state

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
        name, kind = text(metadata, "name"), text(metadata, "class_name")
        if entry.identifier in _MODELS:
            model = model or metadata
        elif entry.identifier not in _NOT_LAYERS and kind != "PruneLowMagnitude":
            classes.setdefault(name, kind)
        if kind == "PruneLowMagnitude":
            tfmot_schedule = schedule(part(part(metadata, "config"), "pruning_schedule"))
            wrappers[PruningWrapper("tfmot", name.removeprefix(PRUNED_PREFIX), tfmot_schedule)] = None
        if kind == "Lambda":
            code[f"Lambda layer {name}"] = None
        elif ">" in kind:
            code[f"custom class {kind.rpartition('>')[2]}"] = None
    training = part(model, "training_config")
    return KerasFacts(
        classes=classes,
        model=keras_config.measured(
            {"class_name": model["class_name"], "config": model["config"]} if _has_config(model) else None, path
        ),
        version=text(model, "keras_version"),
        optimizer=keras_config.optimizer(training),
        training=keras_config.training(training),
        wrappers=tuple(wrappers),
        code=tuple(code),
    )


def _has_config(model: Mapping[str, Any]) -> bool:
    return "class_name" in model and bool(part(model, "config"))


_RUNS_GRAPHS = "A SavedModel runs only the operations of its graph, no Python code, unless Keras rebuilds its layers."


def open_saved_model(path: Path) -> ModelFile:
    """Open a SavedModel by its folder."""
    graph = read_graph(path / "saved_model.pb")
    metadata = path / "keras_metadata.pb"
    # Keras 2.5 moved its descriptions out of saved_model.pb into a file of their own.
    keras = read_facts(
        *((metadata, read_keras_metadata(metadata)) if metadata.is_file() else (graph.path, graph.objects))
    )
    index = path / "variables" / "variables.index"
    files = _files(path)
    if not index.is_file():
        return _frozen(path, graph, keras, files)
    bundle = read_bundle(index)
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
    )


def _frozen(path: Path, graph: SavedGraph, keras: KerasFacts, files: tuple[Path, ...]) -> ModelFile:
    """A model that has no variables: its weights are constants in the graph, if it has any."""
    if any(".data-" in file.name and file.parent.name == "variables" for file in files):
        raise InputError(f"{path} is incomplete: it has data, but no variables.index")
    try:
        tensors = constants(graph)
    except WireError as error:
        raise InputError(f"{graph.path} is damaged: its graph holds {error}") from error
    note = (
        "It has no variables: its weights are constants of the graph."
        if tensors
        else "It has neither variables nor weights in its graph."
    )
    return ModelFile(
        path=path,
        format="saved-model",
        tensors=tensors,
        about=_about(graph, keras, optimizer="", note=note),
        files=files,
    )


def _about(graph: SavedGraph, keras: KerasFacts, *, optimizer: str, note: str) -> ModelInfo:
    producer = f"tensorflow {graph.version}" if graph.version else "tensorflow"
    graphs_note = f"It holds {len(graph.graphs)} graphs, for different uses." if len(graph.graphs) > 1 else ""
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
    return f"It holds some variables twice, as Keras 3 exports them: {nbytes} bytes are copies." if nbytes else ""


def _zeroed_note(bundle: Bundle) -> str:
    leaders = {entry.key: entry.nbytes for entry in bundle.shared.values()}
    if not leaders:
        return ""
    nbytes = sum(leaders.values())
    return f"The state of its optimizer is stripped: its graph still asks for it, and gets {nbytes} bytes of zeros."


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


def strip_saved_model(model: ModelFile, options: StripOptions, targets: dict[Path, Path]) -> tuple[RemovedItem, ...]:
    """Write the folder without the parts in the options; returns the removed items."""
    if options.to_half:
        raise UsageError(
            f"{model.path} cannot hold 16-bit floats: its graph says the type of every variable",
            hint="leave out --half",
        )
    if options.parts & WRAPPING and model.about.wrappers:
        return unwrap.unwrap(model, options, targets)
    unwritten = dict(targets)
    removed: list[RemovedItem] = []
    if StripPart.TRAINING in options.parts:
        changed, items = unwrap.training_in(model.path)
        for path, content in changed.items():
            unwritten.pop(path).write_bytes(content)
        removed += items
    index = model.path / "variables" / "variables.index"
    if index.is_file():
        bundle = read_bundle(index)
        zeroed = {key: part for key, part in _zeroable_entries(model, bundle).items() if part in options.parts}
        items = unwrap.zeroed_items(bundle, zeroed)
        # Resetting what is alone would gain nothing.
        if any(item.bytes for item in items):
            owned = {index, *bundle.shards.values()}
            rewrite_bundle(
                bundle, BundleEdits(zeros=storage_keys(bundle, zeroed)), {path: unwritten.pop(path) for path in owned}
            )
            removed += items
    patch_files(model, unwritten, ())
    return tuple(removed)


def _zeroable_entries(model: ModelFile, bundle: Bundle) -> Mapping[bytes, StripPart]:
    """What training only needs and may start from zero: not the rates and factors of an optimizer.

    The graph asks for every variable by its name, also when it is only served: none of them can be missing.
    """
    graph = object_graph.read(bundle)
    numbers = {entry.key for entry in bundle.numbers()}
    zeroed_already = bundle.shared.keys() | {entry.key for entry in bundle.shared.values()}
    names = graph.full_names
    # A signature may train, or what is called an optimizer may be a part of the model.
    used = variables_used_by_functions(read_graph(model.path / "saved_model.pb")) if graph.nodes else frozenset()
    return {
        key: part
        for key, part in training_state(bundle, graph).items()
        if key in numbers
        and not storage_keys(bundle, [key]) <= zeroed_already
        and _starts_at_zero(bundle.entries[key])
        and names.get(key.decode("utf-8", "backslashreplace"), "") not in used
    }


def _starts_at_zero(entry: BundleEntry) -> bool:
    return bool(entry.shape) or entry.dtype.kind == "i"


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


def strip_checkpoint(model: ModelFile, options: StripOptions, targets: dict[Path, Path]) -> tuple[RemovedItem, ...]:
    """Write the checkpoint without the parts in the options; returns the removed items."""
    if options.to_half:
        raise UsageError(
            f"{model.path} cannot hold 16-bit floats: the program that restores it expects its variables as they are",
            hint="leave out --half",
        )
    if options.parts & WRAPPING and model.about.wrappers:
        raise InputError(
            f"{model.path} has pruning wrappers, around {model.about.wrappers[0].layer} to begin with, "
            "and a checkpoint does not hold the model that they would be taken out of",
            hint="strip the model that was saved as a whole, or only the rest: --only optimizer,training",
        )
    bundle = read_bundle(model.path)
    graph = object_graph.read(bundle)
    optimizer_state = {key: part for key, part in training_state(bundle, graph).items() if part is StripPart.OPTIMIZER}
    if not optimizer_state or StripPart.OPTIMIZER not in options.parts:
        patch_files(model, targets, ())
        return ()
    texts = {}
    if graph.nodes:
        texts[object_graph.KEY] = object_graph.remove_nodes(graph, find_ownership(graph).training_only)
    rewrite_bundle(
        bundle, BundleEdits(drops=storage_keys(bundle, optimizer_state) | optimizer_state.keys(), texts=texts), targets
    )
    return unwrap.removed_items(bundle, optimizer_state)
