"""What a file says of how its model is trained: loss, optimizer, metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import h5py

from prunectl.formats.base import ModelFile
from prunectl.formats.json_text import parse_object
from prunectl.formats.keras.config import part
from prunectl.formats.tensorflow.saved_model_graph import read_graph, read_keras_metadata

_PARTS = ("loss", "metrics", "weighted_metrics", "loss_weights")


def said(file: ModelFile) -> dict[str, Any]:
    """Return the parts of a training configuration, as the file words them."""
    found = _configuration(file)
    parts = {key: found[key] for key in _PARTS if found.get(key)}
    optimizer = found.get("optimizer_config") or found.get("optimizer")
    if optimizer:
        parts["optimizer"] = optimizer
    return parts


def _configuration(file: ModelFile) -> Mapping[str, Any]:
    if file.format == "keras":
        return part(file.about.keras, "compile_config")
    if file.format == "keras-h5":
        return _of_hdf5(file)
    return _of_folder(file)


def _of_hdf5(file: ModelFile) -> Mapping[str, Any]:
    with h5py.File(file.path, "r", locking=False) as held:
        text = held.attrs.get("training_config")
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    return parse_object(text, file.path, "training_config") if isinstance(text, str) else {}


def _of_folder(file: ModelFile) -> Mapping[str, Any]:
    metadata = file.path / "keras_metadata.pb"
    objects = read_keras_metadata(metadata) if metadata.is_file() else read_graph(file.path / "saved_model.pb").objects
    for found in objects:
        if found.metadata and found.identifier.startswith("_tf_keras"):
            training = part(parse_object(found.metadata, file.path, "its Keras metadata"), "training_config")
            if training:
                return training
    return {}
