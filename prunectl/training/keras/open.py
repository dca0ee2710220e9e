"""Opens a Keras file for training."""

from __future__ import annotations

from functools import partial

from prunectl.formats.base import ModelFile
from prunectl.training.keras.loading import load
from prunectl.training.keras.network import KerasNetwork
from prunectl.training.network import Network, Origin


def open_network(model: ModelFile, origin: Origin) -> Network:
    """Return the model of a file as a network of the Keras that wrote it."""
    return KerasNetwork(partial(load, model, origin))
