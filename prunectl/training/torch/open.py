"""From a file to a network in PyTorch, which is imported here and not before."""

from __future__ import annotations

import importlib

from prunectl.formats.base import ModelFile
from prunectl.formats.optional import require
from prunectl.training.network import Network, Origin


def open_network(model: ModelFile, origin: Origin) -> Network:
    """Return a model as PyTorch trains it."""
    require("torch", extra="torch")
    build = importlib.import_module("prunectl.training.torch.build").build
    network = importlib.import_module("prunectl.training.torch.network").TorchNetwork
    found: Network = network(build(model, origin))
    return found
