"""TensorFlow SavedModel folders: a graph, and a bundle of variables."""

from __future__ import annotations

from pathlib import Path

from prunectl.errors import InputError
from prunectl.formats.base import About, ModelFile
from prunectl.formats.protobuf import WireError
from prunectl.formats.tensorflow import bundle_tensors, object_graph
from prunectl.formats.tensorflow.bundle import Bundle, read_bundle
from prunectl.formats.tensorflow.graph_constants import constants
from prunectl.formats.tensorflow.keras_objects import KerasFacts, read_facts
from prunectl.formats.tensorflow.saved_model_graph import SavedGraph, read_graph, read_keras_metadata

MAX_FILES = 10_000
_RUNS_GRAPHS = "A SavedModel runs only the operations of its graph, no Python code, unless Keras rebuilds its layers."


def open_model(path: Path) -> ModelFile:
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
    tensors = bundle_tensors.tensors_of(bundle, objects, keras.classes)
    copies = bundle_tensors.copies(bundle, names)
    return ModelFile(
        path=path,
        format="saved-model",
        tensors=tensors,
        about=_about(
            graph,
            keras,
            optimizer=keras.optimizer or bundle_tensors.optimizer(tensors, names),
            note=_duplicates(sum(tensor.nbytes for tensor in tensors if tensor.name in copies)) or _reset(bundle),
        ),
        files=files,
        decode=bundle_tensors.decoder(bundle),
        copies=copies,
    )


def _frozen(path: Path, graph: SavedGraph, keras: KerasFacts, files: tuple[Path, ...]) -> ModelFile:
    """Return a model that has no variables: its weights are constants in the graph, if it has any."""
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


def _about(graph: SavedGraph, keras: KerasFacts, *, optimizer: str, note: str) -> About:
    producer = f"tensorflow {graph.version}" if graph.version else "tensorflow"
    several = f"It holds {len(graph.graphs)} graphs, for different uses." if len(graph.graphs) > 1 else ""
    return About(
        producer=f"{producer}, keras {keras.version}" if keras.version else producer,
        wrappers=keras.wrappers,
        optimizer=optimizer,
        training=keras.training,
        code=keras.code,
        code_bytes=sum(found.value for found in graph.graphs),
        notes=tuple(filter(None, (note, several, _RUNS_GRAPHS if keras.code else ""))),
        keras=keras.model,
    )


def _duplicates(nbytes: int) -> str:
    return f"It holds some variables twice, as Keras 3 exports them: {nbytes} bytes are copies." if nbytes else ""


def _reset(bundle: Bundle) -> str:
    resting = {entry.key: entry.nbytes for entry in bundle.shared.values()}
    if not resting:
        return ""
    nbytes = sum(resting.values())
    return f"The state of its optimizer is stripped: its graph still asks for it, and gets {nbytes} bytes of zeros."


def _files(path: Path) -> tuple[Path, ...]:
    """Return every file of the folder, without following links to other folders."""
    found: list[Path] = []
    pending, count = [path], 0
    while pending:
        try:
            children = list(pending.pop().iterdir())
        except OSError as error:
            raise InputError(f"{path} cannot be listed: {error.strerror}") from error
        count += len(children)
        if count > MAX_FILES:
            raise InputError(f"{path} is refused: it holds more than {MAX_FILES} files")
        found.extend(child for child in children if child.is_file())
        pending.extend(child for child in children if child.is_dir() and not child.is_symlink())
    return tuple(sorted(found))
