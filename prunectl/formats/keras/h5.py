"""Keras `.h5`: whole models and weights, of Keras 1, 2 and 3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunectl.errors import InputError
from prunectl.formats import budgets
from prunectl.formats.base import About, Array, ModelFile, Tensor
from prunectl.formats.json_text import parse_object
from prunectl.formats.keras import config as keras_config
from prunectl.formats.keras import hdf5, named, numbered
from prunectl.formats.keras.hdf5 import Contents
from prunectl.formats.keras.hdf5_walk import Place


def open_model(path: Path) -> ModelFile:
    """Open an HDF5 file that Keras wrote."""
    contents = hdf5.read_contents(Place(path, 0, path.stat().st_size))
    config = keras_config.measured(_parsed(contents, "model_config"), path)
    tensors = describe(contents, config)
    root = _root(contents)
    training = _parsed(contents, "training_config") or {}
    return ModelFile(
        path=path,
        format="keras-h5",
        tensors=tensors,
        about=About(
            producer=_producer(contents),
            wrappers=keras_config.wrappers(config),
            optimizer=keras_config.optimizer(training),
            training=keras_config.training(training),
            code=keras_config.code(config),
            notes=() if root is None else named.broken_promises(contents, root),
            is_compressed=contents.is_compressed,
            keras=config,
        ),
        files=(path,),
        decode=decoder(contents),
    )


def describe(contents: Contents, config: dict[str, Any] | None) -> tuple[Tensor, ...]:
    """Return the tensors of a file, whichever way its Keras lays them out."""
    root = _root(contents)
    if root is not None:
        return named.describe(contents, root, config)
    if any("vars" in found.name.split("/") for found in contents.datasets):
        return numbered.describe(contents, config)
    raise InputError(f"{contents.place.path} is an HDF5 file, but not one that Keras wrote: it names no layers")


def _root(contents: Contents) -> str | None:
    """Return the group that names its layers, if there is one."""
    keys = ("layer_names", "layer_names0")
    return next(
        (root for root in ("model_weights", "") if any(contents.attribute(root, key) is not None for key in keys)), None
    )


def decoder(contents: Contents) -> Any:
    """Return what reads a tensor that does not lie flat."""
    names = {found.storage.key: found.name for found in contents.datasets}

    def decode(tensor: Tensor) -> Array:
        return hdf5.decode(contents.place, names[tensor.storage.key], tensor.dtype, tensor.shape)

    return decode


def _parsed(contents: Contents, key: str) -> dict[str, Any] | None:
    said = contents.attribute("", key)
    if not isinstance(said, str):
        return None
    return parse_object(said, contents.place.path, key, budgets.MAX_KERAS_OBJECT_BYTES)


def _producer(contents: Contents) -> str:
    for root in ("", "model_weights"):
        version = contents.attribute(root, "keras_version")
        backend = contents.attribute(root, "backend")
        if isinstance(version, str):
            return f"keras {version}" + (f" on {backend}" if isinstance(backend, str) else "")
    return ""
