"""Opens a file of Keras 2 for training, with tfmot at hand."""

from __future__ import annotations

from functools import partial

from prunectl.formats.base import ModelFile
from prunectl.training.keras.loading import load
from prunectl.training.network import Network, Origin
from prunectl.training.tfmot.network import TfmotNetwork


def open_network(model: ModelFile, origin: Origin) -> Network:
    """Return the model of a file as a network that tfmot can prune."""
    return TfmotNetwork(partial(load, model, origin))
