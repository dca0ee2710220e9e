"""Open files of Keras 1, 2 and 3, `.h5` and `.keras`: whole models, and weights alone.

A `.keras` archive is a zip of a JSON configuration and an HDF5 file of weights; deflated weights are inflated into a
scratch file.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

from prunectl.errors import InputError
from prunectl.formats import budgets
from prunectl.formats.base import Array, ModelFile, ModelInfo, Tensor
from prunectl.formats.keras import config as keras_config
from prunectl.formats.keras import hdf5, layouts
from prunectl.formats.keras.hdf5 import H5Contents, H5Location
from prunectl.formats.keras.layouts import NumberedWeights
from prunectl.formats.safe_json import parse_object
from prunectl.formats.scratch import Scratch
from prunectl.formats.zip_read import Archive, ZipEntry, open_archive


def open_h5(path: Path) -> ModelFile:
    """Open an HDF5 file that Keras wrote."""
    contents = hdf5.read_contents(H5Location(path, 0, path.stat().st_size))
    config = keras_config.size_checked(_parsed(contents, "model_config"), path)
    tensors, copies = _describe(contents, config)
    root = layouts.layer_names_group(contents)
    training = _parsed(contents, "training_config") or {}
    return ModelFile(
        path=path,
        format="keras-h5",
        tensors=tensors,
        about=ModelInfo(
            producer=_producer(contents),
            wrappers=keras_config.wrappers(config),
            optimizer=keras_config.optimizer(training),
            training=keras_config.training(training),
            code=keras_config.code(config),
            notes=() if root is None else layouts.missing_weights(contents, root),
            is_compressed=contents.is_compressed,
            keras=config,
        ),
        files=(path,),
        decode=_decoder(contents),
        duplicates=copies,
    )


def _describe(contents: H5Contents, config: dict[str, Any] | None) -> NumberedWeights:
    """The tensors of a file, in either of the two layouts."""
    root = layouts.layer_names_group(contents)
    if root is not None:
        return NumberedWeights(layouts.tensors_by_layer_name(contents, root, config), {})
    if any("vars" in dataset.name.split("/") for dataset in contents.datasets):
        return layouts.tensors_by_path(contents, config)
    raise InputError(f"{contents.location.path} is an HDF5 file, but not a Keras model: it names no layers")


def _decoder(contents: H5Contents) -> Any:
    """A reader of chunked or filtered tensors."""
    names = {dataset.storage.key: dataset.name for dataset in contents.datasets}

    def decode(tensor: Tensor) -> Array:
        return hdf5.decode(contents.location, names[tensor.storage.key], tensor.dtype, tensor.shape)

    return decode


def _parsed(contents: H5Contents, key: str) -> dict[str, Any] | None:
    text = contents.attribute("", key)
    if not isinstance(text, str):
        return None
    return parse_object(text, contents.location.path, key, budgets.MAX_KERAS_OBJECT_BYTES)


def _producer(contents: H5Contents) -> str:
    for root in ("", "model_weights"):
        version = contents.attribute(root, "keras_version")
        backend = contents.attribute(root, "backend")
        if isinstance(version, str):
            return f"keras {version}" + (f" on {backend}" if isinstance(backend, str) else "")
    return ""


WEIGHTS = "model.weights.h5"


def open_zip(path: Path) -> ModelFile:
    """Open a `.keras` archive."""
    archive = open_archive(path)
    text = archive.read("config.json", budgets.MAX_JSON_BYTES)
    config = parse_object(text, path, "its config.json", budgets.MAX_KERAS_OBJECT_BYTES)
    keras_config.size_checked(config, path)
    weights = archive.entries[WEIGHTS]
    # Before the weights are inflated: an error below would keep the scratch file as long as its traceback lives.
    about = _about(path, archive, config, is_compressed=not weights.is_stored)
    model = _stored(path, weights, config) if weights.is_stored else _deflated(path, archive, weights, config)
    return replace(model, about=replace(about, notes=layouts.unmatched_note(model.tensors)))


def _stored(path: Path, weights: ZipEntry, config: dict[str, Any]) -> ModelFile:
    contents = hdf5.read_contents(H5Location(path, weights.extent.offset, weights.nbytes))
    return _model(path, _describe(contents, config), _decoder(contents))


def _deflated(path: Path, archive: Archive, weights: ZipEntry, config: dict[str, Any]) -> ModelFile:
    # Libhdf5 must be able to seek: the weights are inflated into a file that lives as long as the model.
    scratch = Scratch()
    try:
        inflated = inflated_model(archive, config, scratch.path / WEIGHTS)
    except BaseException:
        scratch.remove()
        raise
    inner = {tensor.storage.key: tensor for tensor in inflated.tensors}
    share = weights.extent.nbytes / max(weights.nbytes, 1)

    def decode(tensor: Tensor) -> Array:
        return inflated.read(inner[tensor.storage.key])

    weakref.finalize(decode, scratch.remove)
    tensors = tuple(_without_extent(tensor, share) for tensor in inner.values())
    return _model(path, NumberedWeights(tensors, inflated.duplicates), decode)


def inflate(archive: Archive, target: Path) -> H5Contents:
    """Write the weights of an archive to a file of their own, and read its contents."""
    weights = archive.entries[WEIGHTS]
    with target.open("wb") as file:
        file.writelines(archive.pieces(weights))
    try:
        return hdf5.read_contents(H5Location(target, 0, weights.nbytes))
    except InputError as error:
        # The user does not know the file that the weights were inflated into.
        raise InputError(error.message.replace(str(target), f"{archive.path}: its {WEIGHTS}")) from error


def inflated_model(archive: Archive, config: dict[str, Any], target: Path) -> ModelFile:
    """The weights of an archive as a model, in a file of their own."""
    contents = inflate(archive, target)
    weights = _describe(contents, config)
    return ModelFile(
        target, "keras-h5", weights.tensors, ModelInfo(), (target,), _decoder(contents), duplicates=weights.copies
    )


def _without_extent(tensor: Tensor, share: float) -> Tensor:
    """A tensor without an extent in the archive, only with a share of the deflated bytes."""
    storage = replace(tensor.storage, extent=None, stored_bytes=int(tensor.storage.stored_bytes * share))
    return replace(tensor, storage=storage)


def _model(path: Path, weights: NumberedWeights, decode: Any) -> ModelFile:
    return ModelFile(path, "keras", weights.tensors, ModelInfo(), (path,), decode, duplicates=weights.copies)


def _about(path: Path, archive: Archive, config: dict[str, Any], *, is_compressed: bool) -> ModelInfo:
    metadata: dict[str, Any] = {}
    if "metadata.json" in archive.entries:
        text = archive.read("metadata.json", budgets.MAX_JSON_BYTES)
        metadata = parse_object(text, path, "its metadata.json", budgets.MAX_KERAS_OBJECT_BYTES)
    compiled = keras_config.object_in(config, "compile_config")
    version = keras_config.string_in(metadata, "keras_version")
    return ModelInfo(
        producer=f"keras {version}" if version else "",
        wrappers=keras_config.wrappers(config),
        optimizer=keras_config.object_name(compiled.get("optimizer")),
        training=keras_config.training(compiled),
        code=keras_config.code(config),
        is_compressed=is_compressed,
        keras=config,
    )
