"""Keras `.keras`: a zip with a configuration and an HDF5 file of weights."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

from prunectl.errors import InputError
from prunectl.formats import budgets
from prunectl.formats.base import About, Array, ModelFile, Tensor
from prunectl.formats.json_text import parse_object
from prunectl.formats.keras import config as keras_config
from prunectl.formats.keras import h5, hdf5, numbered
from prunectl.formats.keras.hdf5_walk import Place
from prunectl.formats.scratch import Scratch
from prunectl.formats.zips import Archive, Entry, open_archive

WEIGHTS = "model.weights.h5"


def open_model(path: Path) -> ModelFile:
    """Open a `.keras` archive."""
    archive = open_archive(path)
    said = archive.read("config.json", budgets.MAX_JSON_BYTES)
    config = parse_object(said, path, "its config.json", budgets.MAX_KERAS_OBJECT_BYTES)
    keras_config.measured(config, path)
    weights = archive.entries[WEIGHTS]
    # Before the weights are inflated, lest they stay for as long as somebody holds on to what is wrong with the rest.
    about = _about(path, archive, config, is_compressed=not weights.is_stored)
    model = _stored(path, weights, config) if weights.is_stored else _deflated(path, archive, weights, config)
    return replace(model, about=replace(about, notes=numbered.notes(model.tensors)))


def _stored(path: Path, weights: Entry, config: dict[str, Any]) -> ModelFile:
    contents = hdf5.read_contents(Place(path, weights.extent.offset, weights.nbytes))
    return _model(path, h5.describe(contents, config), h5.decoder(contents))


def _deflated(path: Path, archive: Archive, weights: Entry, config: dict[str, Any]) -> ModelFile:
    # Libhdf5 must be able to seek: the weights are inflated into a file that lives as long as the model.
    scratch = Scratch()
    try:
        inside = inflate(archive, config, scratch.path / WEIGHTS)
    except BaseException:
        scratch.remove()
        raise
    inner = {tensor.storage.key: tensor for tensor in inside.tensors}
    share = weights.extent.nbytes / max(weights.nbytes, 1)

    def decode(tensor: Tensor) -> Array:
        return inside.read(inner[tensor.storage.key])

    weakref.finalize(decode, scratch.remove)
    return _model(path, tuple(_hidden(tensor, share) for tensor in inner.values()), decode)


def inflate(archive: Archive, config: dict[str, Any], target: Path) -> ModelFile:
    """Write the weights of an archive to a file of their own, and open it."""
    weights = archive.entries[WEIGHTS]
    with target.open("wb") as file:
        file.writelines(archive.pieces(weights))
    try:
        contents = hdf5.read_contents(Place(target, 0, weights.nbytes))
    except InputError as error:
        # The user has never heard of the file that they were inflated into.
        raise InputError(error.message.replace(str(target), f"{archive.path}: its {WEIGHTS}")) from error
    return ModelFile(target, "keras-h5", h5.describe(contents, config), About(), (target,), h5.decoder(contents))


def _hidden(tensor: Tensor, share: float) -> Tensor:
    """Return a tensor that has no place of its own in the archive, only a share of what is deflated."""
    storage = replace(tensor.storage, extent=None, stored_bytes=int(tensor.storage.stored_bytes * share))
    return replace(tensor, storage=storage)


def _model(path: Path, tensors: tuple[Tensor, ...], decode: Any) -> ModelFile:
    return ModelFile(path, "keras", tensors, About(), (path,), decode)


def _about(path: Path, archive: Archive, config: dict[str, Any], *, is_compressed: bool) -> About:
    metadata: dict[str, Any] = {}
    if "metadata.json" in archive.entries:
        said = archive.read("metadata.json", budgets.MAX_JSON_BYTES)
        metadata = parse_object(said, path, "its metadata.json", budgets.MAX_KERAS_OBJECT_BYTES)
    compiled = keras_config.part(config, "compile_config")
    version = keras_config.text(metadata, "keras_version")
    return About(
        producer=f"keras {version}" if version else "",
        wrappers=keras_config.wrappers(config),
        optimizer=keras_config.named(compiled.get("optimizer")),
        training=keras_config.training(compiled),
        code=keras_config.code(config),
        is_compressed=is_compressed,
        keras=config,
    )
