"""Keras `.h5`: whole models and weights, of Keras 1, 2 and 3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunectl.errors import InputError
from prunectl.formats import budgets
from prunectl.formats.base import Array, ModelFile, ModelInfo, Tensor
from prunectl.formats.keras import config as keras_config
from prunectl.formats.keras import hdf5, layouts
from prunectl.formats.keras.hdf5 import H5Contents, H5Location
from prunectl.formats.safe_json import parse_object


def open_h5(path: Path) -> ModelFile:
    """Open an HDF5 file that Keras wrote."""
    contents = hdf5.read_contents(H5Location(path, 0, path.stat().st_size))
    config = keras_config.measured(_parsed(contents, "model_config"), path)
    tensors = describe(contents, config)
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
        decode=decoder(contents),
    )


def describe(contents: H5Contents, config: dict[str, Any] | None) -> tuple[Tensor, ...]:
    """The tensors of a file, whichever way its Keras lays them out."""
    root = layouts.layer_names_group(contents)
    if root is not None:
        return layouts.tensors_by_layer_name(contents, root, config)
    if any("vars" in dataset.name.split("/") for dataset in contents.datasets):
        return layouts.tensors_by_path(contents, config)
    raise InputError(f"{contents.location.path} is an HDF5 file, but not a Keras model: it names no layers")


def decoder(contents: H5Contents) -> Any:
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
