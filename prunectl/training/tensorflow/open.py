"""Opens a SavedModel that holds no Keras model for training, through what it serves."""

from __future__ import annotations

import importlib
from functools import partial

from prunectl.errors import UntrustedError
from prunectl.formats.base import ModelFile
from prunectl.training.keras.library import keras_two
from prunectl.training.network import Network, Origin

_REACHING_OUT = (b"PyFunc", b"ReadFile", b"WriteFile", b"MatchingFiles")
"""Operations that do more than reckon."""
_PROGRAM = "saved_model.pb"


def open_network(model: ModelFile, origin: Origin) -> Network:
    """Return a model as TensorFlow trains it."""
    keras_two()
    if origin.model:
        keras = importlib.import_module("prunectl.training.keras.open")
        built: Network = keras.open_network(model, origin)
        return built
    check_trusted(model, origin)
    inside = importlib.import_module("prunectl.training.tensorflow.network")
    found: Network = inside.ServedNetwork(partial(inside.load, model))
    return found


def check_trusted(model: ModelFile, origin: Origin) -> None:
    """Refuse a program that calls Python or touches files, which loading or running it would do."""
    if origin.is_trusted:
        return
    program = (model.path / _PROGRAM).read_bytes()
    facts = [*model.about.code, *(f"operation {name.decode()}" for name in _REACHING_OUT if name in program)]
    if facts:
        raise UntrustedError(
            f"{model.path} holds code: {', '.join(facts[:5])}", hint="if you trust where it comes from: --trust"
        )
