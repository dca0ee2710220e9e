"""Running a Keras network on random numbers, in the Keras that it belongs to."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from prunectl.channels.adapter import Feeds, Runner
from prunectl.channels.graph import OpKind
from prunectl.channels.keras.traverse import LoadedKeras
from prunectl.errors import PrunectlError, WorkError, first_line
from prunectl.formats import zip_write
from prunectl.formats.base import Array
from prunectl.formats.keras.archive import WEIGHTS
from prunectl.formats.keras.config import part, text
from prunectl.formats.keras.hdf5 import rewrite
from prunectl.formats.keras.hdf5.rebuild import address_of
from prunectl.formats.keras.hdf5.rewrite import H5Edits, create_like, rebuild_with
from prunectl.formats.registry import open_model
from prunectl.formats.sandbox import run_sandboxed
from prunectl.formats.scratch import temporary_folder
from prunectl.formats.zip_read import open_archive
from prunectl.training.backend import ModelOrigin
from prunectl.training.keras.backend import KerasLibrary, ignore_warnings
from prunectl.training.keras.compile import outputs as compile_outputs
from prunectl.training.keras.compile.outputs import flatten
from prunectl.training.keras.distribution import DevicePlacement
from prunectl.training.keras.load import load

_CONFIG = "config.json"
_BYTES_PER_SECOND = 1 << 20
_ROOM = 512 << 20
_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class EditedFile:
    """Changes to a file; None where the configuration stays as it is."""

    config: Mapping[str, Any] | None = None
    arrays: Mapping[str, Array] = field(default_factory=dict)
    """Weights by their names."""


def write(opened: LoadedKeras, draft: EditedFile, target: Path) -> None:
    """Write a file that is laid out like the one that was read."""
    model = opened.model
    if model.format == "keras-h5":
        attributes: dict[tuple[str, str], str | list[str] | None] = (
            {} if draft.config is None else {("", "model_config"): json.dumps(draft.config)}
        )
        _write_h5(opened, draft, H5Edits(attributes=attributes), target)
        return
    with temporary_folder() as scratch:
        weights = scratch / WEIGHTS
        _write_h5(opened, draft, H5Edits(), weights)
        with weights.open("rb") as file:
            pieces = iter(partial(file.read, _PIECE), b"")
            changed: dict[str, Any] = {WEIGHTS: (weights.stat().st_size, pieces)}
            if draft.config is not None:
                text = json.dumps(draft.config).encode()
                changed[_CONFIG] = (len(text), [text])
            zip_write.rewrite_zip(open_archive(model.path), target, changed)


def _write_h5(opened: LoadedKeras, draft: EditedFile, edits: H5Edits, target: Path) -> None:
    stored = opened.stored
    paths = {tensor.name: stored.path(tensor) for tensor in opened.model.tensors}
    arrays = {paths[name]: np.ascontiguousarray(array) for name, array in draft.arrays.items()}
    edited = target.with_name(f"{target.name}.edited")
    nbytes = stored.file.stat().st_size
    try:
        rewrite.edit(stored.file, edited, edits, stored.contents, opened.model.path)
        run_sandboxed(
            partial(_rebuilt, edited, target, arrays, opened.model.path),
            opened.model.path,
            seconds=10 + nbytes / _BYTES_PER_SECOND,
            extra_bytes=_ROOM + 2 * nbytes,
            written=(target,),
        )
    finally:
        edited.unlink(missing_ok=True)


def _rebuilt(source: Path, target: Path, arrays: Mapping[str, Array], shown: Path) -> bytes:
    with h5py.File(source, "r", locking=False) as file:
        makers = {address_of(file[path]): partial(_resized, array) for path, array in arrays.items()}
    rebuild_with(source, target, makers, shown)
    return b""


def _resized(array: Array, old: Any, parent: Any, key: str) -> Any:
    """Return a dataset with other numbers, stored and compressed as the old one was."""
    plan = old.id.get_create_plist()
    if plan.get_layout() == h5py.h5d.CHUNKED:
        chunks = zip(plan.get_chunk(), array.shape, strict=True)
        plan.set_chunk(tuple(max(1, min(pair)) for pair in chunks))
    numbers = array.view(np.uint8) if array.dtype.isbuiltin != 1 else array
    return create_like(old, parent, key, numbers, space=h5py.h5s.create_simple(array.shape), properties=plan)


_LOW = frozenset({"float16", "bfloat16", "mixed_float16", "mixed_bfloat16"})
_LOWER = {"float32": _LOW, "float64": _LOW | {"float32"}}


def with_precision(precision: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the configuration with every lower precision raised to float32, or to float64."""
    return {str(key): _changed(value, str(key), precision) for key, value in config.items()}


def _changed(value: Any, key: str, precision: str) -> Any:
    if key == "dtype" and (value if isinstance(value, str) else _policy(value)) in _LOWER[precision]:
        return precision
    if isinstance(value, Mapping):
        return with_precision(precision, value)
    if isinstance(value, list):
        return [_changed(one, "", precision) for one in value]
    return value


def _policy(value: Any) -> str:
    return text(part(value, "config"), "name")


_FEW = 2
"""Whole numbers go up to here, so that any table of words has them."""


def random_inputs(opened: LoadedKeras, random: np.random.Generator) -> Feeds:
    """Return random inputs: numbers of words where they are looked up."""
    words = {node.inputs[1] for node in opened.graph.nodes if node.kind is OpKind.EMBEDDING}
    return {name: _feed(opened, name, words, random) for name in opened.graph.inputs}


def runner(
    opened: LoadedKeras, draft: EditedFile, origin: ModelOrigin, shown: Iterable[str], *, precision: str
) -> Runner:
    """Return what Keras makes of a draft: its outputs, and what some layers give before their activations."""
    config = with_precision(precision, opened.config if draft.config is None else draft.config)
    with temporary_folder() as scratch:
        path = scratch / f"draft{'.keras' if opened.model.format == 'keras' else '.h5'}"
        write(opened, EditedFile(config, draft.arrays), path)
        try:
            loaded = load(open_model(path), origin, DevicePlacement())
        except PrunectlError as error:
            said = error.message.replace(str(path), str(opened.model.path))
            raise type(error)(f"{said}; nothing was written", hint=error.hint) from error
        except Exception as error:
            raise WorkError(
                f"the network cannot be loaded by Keras: {first_line(error)}; nothing was written"
            ) from error
    names = tuple(shown)
    showable = opened.net.showable
    looks = {name: showable[name] for name in names}
    seen: dict[str, list[Any]] = {name: [] for name in looks}
    for name, look in looks.items():
        _listen(_layer(loaded.model, look.names), seen[name])

    def run(given: Feeds) -> list[Any]:
        for kept in seen.values():
            kept.clear()
        values = tuple(given[name] for name in opened.graph.inputs)
        with ignore_warnings():
            made = loaded.model(compile_outputs.pack_inputs(loaded.model, values), training=False)
        outputs = [_array(loaded.library, one) for one in flatten(made)]
        # A layer that is called for each step in time gives its steps one by one; in the graph they are a batch.
        inner = {name: np.concatenate([_array(loaded.library, one) for one in kept]) for name, kept in seen.items()}
        return [*outputs, *(inner[name].transpose(looks[name].order) for name in names)]

    return run


def _feed(opened: LoadedKeras, name: str, words: set[str], random: np.random.Generator) -> Array:
    shape, kind = opened.graph.shapes[name], opened.net.inputs[name]
    if kind == "string":
        raise WorkError(f"the network takes an input, {name}, of which nothing random can be made")
    if name in words or kind.startswith(("int", "uint", "bool")):
        return random.integers(0, _FEW, shape).astype(kind if name not in words else "int32")
    return random.standard_normal(shape).astype(np.float32)


def _layer(model: Any, names: Iterable[str]) -> Any:
    for name in names:
        model = model.get_layer(name) if hasattr(model, "get_layer") else model.layer
    return model


def _listen(layer: Any, kept: list[Any]) -> None:
    """Let a layer put down what it hands to its activation."""
    activation: Callable[[Any], Any] = layer.activation

    def listening(value: Any) -> Any:
        kept.append(value)
        return value if activation is None else activation(value)

    layer.activation = listening


def _array(library: KerasLibrary, value: Any) -> Array:
    if library.is_keras2 or library.is_on_tensorflow:
        return np.asarray(value)
    found: Array = library.keras.ops.convert_to_numpy(value)
    return found
