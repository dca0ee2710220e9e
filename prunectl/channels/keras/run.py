"""Writes edited Keras files, and runs the networks in them with the version of Keras that they belong to."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from prunectl.channels.adapter import Feeds
from prunectl.channels.graph import OpKind
from prunectl.channels.keras.traverse import LoadedKeras
from prunectl.errors import PrunectlError, WorkError, first_line
from prunectl.formats import budgets, zip_write
from prunectl.formats.base import Array
from prunectl.formats.keras.config import object_in, string_in, with_precision
from prunectl.formats.keras.hdf5 import rewrite
from prunectl.formats.keras.hdf5.rebuild import address_of, run_rewriting
from prunectl.formats.keras.hdf5.rewrite import H5Edits, create_like, rebuild_with
from prunectl.formats.keras.model import WEIGHTS
from prunectl.formats.registry import open_model
from prunectl.formats.scratch import temporary_folder
from prunectl.formats.trust import OR_BUILD
from prunectl.formats.zip_read import open_archive
from prunectl.training.backend import LoadOptions
from prunectl.training.keras import outputs as compile_outputs
from prunectl.training.keras._compat import flat_layers
from prunectl.training.keras.backend import DevicePlacement, KerasLibrary
from prunectl.training.keras.load import LoadedModel, load
from prunectl.training.keras.outputs import flatten
from prunectl.training.quiet import ignore_warnings

_CONFIG = "config.json"


@dataclass(frozen=True, slots=True)
class EditedFile:
    """The changes to a Keras file."""

    config: Mapping[str, Any] | None = None
    """The new configuration; None to keep that of the file."""
    arrays: Mapping[str, Array] = field(default_factory=dict)
    """The new arrays of weights and optimizer slots, by name."""


def write(loaded: LoadedKeras, edited: EditedFile, target: Path) -> None:
    """Write an edited file in the layout of the original."""
    model = loaded.model
    if model.format == "keras-h5":
        attributes: dict[tuple[str, str], str | list[str] | None] = (
            {} if edited.config is None else {("", "model_config"): json.dumps(edited.config)}
        )
        _write_h5(loaded, edited, H5Edits(attributes=attributes), target)
        return
    with temporary_folder() as scratch:
        weights = scratch / WEIGHTS
        _write_h5(loaded, edited, H5Edits(), weights)
        changed = {WEIGHTS: zip_write.file_content(weights)}
        if edited.config is not None:
            text = json.dumps(edited.config).encode()
            changed[_CONFIG] = (len(text), [text])
        zip_write.rewrite_zip(open_archive(model.path), target, changed)


def _write_h5(loaded: LoadedKeras, edited: EditedFile, h5_edits: H5Edits, target: Path) -> None:
    stored = loaded.stored
    paths = {tensor.name: stored.path(tensor) for tensor in loaded.model.tensors}
    arrays = {paths[name]: np.ascontiguousarray(array) for name, array in edited.arrays.items()}
    intermediate = target.with_name(f"{target.name}.edited")
    nbytes = stored.file.stat().st_size
    try:
        rewrite.edit(stored.file, intermediate, h5_edits, stored.contents, loaded.model.path)
        work = partial(_rebuilt, intermediate, target, arrays, loaded.model.path)
        run_rewriting(work, loaded.model.path, nbytes, 2 * nbytes, (target,))
    finally:
        intermediate.unlink(missing_ok=True)


def _rebuilt(source: Path, target: Path, arrays: Mapping[str, Array], display_path: Path) -> bytes:
    with h5py.File(source, "r", locking=False) as file:
        makers = {address_of(file[path]): partial(_resized, array) for path, array in arrays.items()}
    rebuild_with(source, target, makers, display_path)
    return b""


def _resized(array: Array, old: Any, parent: Any, key: str) -> Any:
    """A dataset for a new array, with the storage layout and the compression of the old one."""
    plan = old.id.get_create_plist()
    if plan.get_layout() == h5py.h5d.CHUNKED:
        chunks = zip(plan.get_chunk(), array.shape, strict=True)
        plan.set_chunk(tuple(max(1, min(pair)) for pair in chunks))
    numbers = array.view(np.uint8) if array.dtype.isbuiltin != 1 else array
    return create_like(old, parent, key, numbers, space=h5py.h5s.create_simple(array.shape), properties=plan)


_FALLBACK_WORDS = ("a", "b")
_LONGEST_TEXT = 8
"""Random texts have one word, as a lookup takes, to this many."""
_MAX_INTEGER = 2
"""Random integers are below this, so that they are valid in any embedding table."""


def random_inputs(loaded: LoadedKeras, random: np.random.Generator) -> Feeds:
    """Random inputs: small integers for embeddings and integer inputs, words for texts, normal floats for others."""
    lookups = {node.inputs[1] for node in loaded.graph.nodes if node.kind is OpKind.EMBEDDING}
    return {name: _random_input(loaded, name, lookups, random) for name in loaded.graph.inputs}


def _random_texts(loaded: LoadedKeras, name: str, random: np.random.Generator, count: int) -> list[str]:
    """Random texts for an input: a word each, or several where they are split into words."""
    paths = {call.path for call in loaded.builder.called if name in call.inputs}
    readers = [layer.layer for layer in loaded.layers if layer.path in paths]
    # A lookup may refuse words that are not in its own vocabulary.
    words = _vocabulary(loaded, readers) or _vocabulary(
        loaded, [layer.layer for layer in loaded.layers], has_files=True
    )
    is_split = any(string_in(reader, "class_name") == "TextVectorization" for reader in readers)
    longest = random.choice((1, _LONGEST_TEXT)) if is_split else 1
    return [" ".join(random.choice(words or _FALLBACK_WORDS, longest)) for _ in range(count)]


def _vocabulary(loaded: LoadedKeras, layers: Iterable[Any], *, has_files: bool = False) -> tuple[str, ...]:
    """The words of lookup layers: those in the configuration, and those in files of a `.keras` archive."""
    words = [word for layer in layers for word in object_in(layer, "config").get("vocabulary") or ()]
    if has_files and loaded.model.format == "keras":
        archive = open_archive(loaded.model.path)
        for name in archive.entries:
            if name.endswith("/vocabulary.txt"):
                words += archive.read(name, budgets.MAX_JSON_BYTES).decode(errors="replace").split("\n")
    return tuple(dict.fromkeys(word for word in words if isinstance(word, str)))


def runner(
    loaded: LoadedKeras, edited: EditedFile, origin: LoadOptions, observed: Iterable[str], *, precision: str
) -> RecordingRunner:
    """Write an edited file to a scratch file, and load it in Keras to run it."""
    config = with_precision(precision, loaded.config if edited.config is None else edited.config)
    with temporary_folder() as scratch:
        path = scratch / f"draft{'.keras' if loaded.model.format == 'keras' else '.h5'}"
        write(loaded, EditedFile(config, edited.arrays), path)
        try:
            keras_model = load(open_model(path), origin, DevicePlacement())
        except PrunectlError as error:
            message = error.message.replace(str(path), str(loaded.model.path))
            hint = error.hint.removesuffix(OR_BUILD)
            raise type(error)(f"{message}; nothing was written", hint=hint) from error
        except Exception as error:
            raise WorkError(f"Keras cannot load the network: {first_line(error)}; nothing was written") from error
    return RecordingRunner(loaded, keras_model, tuple(observed))


class RecordingRunner:
    """Runs a network that Keras loaded, and records what layers pass to their activations."""

    def __init__(self, loaded: LoadedKeras, keras_model: LoadedModel, names: tuple[str, ...]) -> None:
        self._inputs, self._keras_model = loaded.graph.inputs, keras_model
        observable = loaded.builder.observable
        self._observed = {name: observable[name] for name in names}
        self._recorded: dict[str, list[Any]] = {name: [] for name in names}
        for name, value in self._observed.items():
            _record_activation(_layer(keras_model.model, value.names), self._recorded[name])

    def __call__(self, feeds: Feeds) -> list[Any]:
        """The outputs of the network, then the observed values, which layers compute before their activations."""
        library, model = self._keras_model.library, self._keras_model.model
        for calls in self._recorded.values():
            calls.clear()
        values = tuple(feeds[name] for name in self._inputs)
        with ignore_warnings():
            result = model(compile_outputs.pack_inputs(model, values), training=False)
        outputs = [_to_numpy(library, item) for item in flatten(result)]
        # A layer inside TimeDistributed may be called once for each step; in the graph the steps are on the batch axis.
        for name, value in self._observed.items():
            steps = np.concatenate([_to_numpy(library, item) for item in self._recorded[name]])
            outputs.append(steps.transpose(value.order))
        return outputs

    def widen(self) -> bool:
        """Switch the layers to float64, as if they had been built so; False if that is not certain to work.

        Keras 3 casts inputs and weights to the compute dtype of a layer at each call.
        """
        library, model = self._keras_model.library, self._keras_model.model
        layers = flat_layers(model, include_self=False)
        if library.is_keras2 or not library.is_on_tensorflow or not type(model).__module__.startswith("keras."):
            return False
        if not all(map(_is_cast_when_called, [*getattr(model, "operations", ()), *layers])):
            return False
        policy = type("Float64", (library.keras.DTypePolicy,), {"compute_dtype": "float64"})("float32")
        for layer in layers:
            if layer.dtype_policy.name == "float32":
                layer.dtype_policy = policy
        return True


_CAST_WHEN_CALLED = re.compile(
    r"keras\.src\.layers\.(activations|attention|convolutional|merging|normalization|pooling|regularization|reshaping|rnn"
    r"|core\.(dense|einsum_dense|embedding|input_layer))\b"
)
"""Layers that keep no value in the precision they were built in, unlike a nested model with its inputs."""


def _is_cast_when_called(layer: Any) -> bool:
    is_plain = _CAST_WHEN_CALLED.match(type(layer).__module__) is not None and not getattr(layer, "stateful", False)
    return is_plain and layer.dtype_policy.name in {"float32", "int32", "int64"}


def _random_input(loaded: LoadedKeras, name: str, lookups: set[str], random: np.random.Generator) -> Array:
    shape, dtype = loaded.graph.shapes[name], loaded.builder.inputs[name]
    if dtype == "string":
        return np.array(_random_texts(loaded, name, random, math.prod(shape)), dtype=object).reshape(shape)
    if name in lookups or dtype.startswith(("int", "uint", "bool")):
        return random.integers(0, _MAX_INTEGER, shape).astype(dtype if name not in lookups else "int32")
    return random.standard_normal(shape).astype(np.float32)


def _layer(model: Any, names: Iterable[str]) -> Any:
    for name in names:
        model = model.get_layer(name) if hasattr(model, "get_layer") else model.layer
    return model


def _record_activation(layer: Any, calls: list[Any]) -> None:
    """Replace the activation of a layer with one that also records its inputs."""
    activation: Callable[[Any], Any] = layer.activation

    def recording(value: Any) -> Any:
        calls.append(value)
        return value if activation is None else activation(value)

    layer.activation = recording


def _to_numpy(library: KerasLibrary, value: Any) -> Array:
    if library.is_keras2 or library.is_on_tensorflow:
        return np.asarray(value)
    array: Array = library.keras.ops.convert_to_numpy(value)
    return array
