"""Opens a SavedModel that holds no Keras model for training, through what it serves."""

from __future__ import annotations

import importlib
from functools import partial

from prunectl.formats.base import ModelFile
from prunectl.training import trusted
from prunectl.training.keras.library import keras_two
from prunectl.training.network import Network, Origin


def open_network(model: ModelFile, origin: Origin) -> Network:
    """Return a model as TensorFlow trains it."""
    trusted.check(model, origin)
    keras_two()
    if origin.model:
        keras = importlib.import_module("prunectl.training.keras.open")
        built: Network = keras.open_network(model, origin)
        return built
    inside = importlib.import_module("prunectl.training.tensorflow.network")
    found: Network = inside.ServedNetwork(partial(inside.load, model))
    return found
