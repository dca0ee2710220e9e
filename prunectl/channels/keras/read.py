"""From a Keras file to a graph that can be followed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prunectl.channels.graph import Graph, Kind
from prunectl.channels.keras.bind import bound
from prunectl.channels.keras.net import Net
from prunectl.channels.keras.spots import Located, located
from prunectl.channels.keras.stored import Stored
from prunectl.channels.keras.walk import Walker
from prunectl.errors import InputError
from prunectl.formats.base import ModelFile
from prunectl.formats.keras.config import listed
from prunectl.formats.keras.layer_calls import Caller
from prunectl.formats.keras.model_calls import run

_OPEN_LENGTHS = (64, 224)
"""Lengths to try for axes other than the batch that the file leaves open."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A Keras file, and what was read from it."""

    model: ModelFile
    stored: Stored
    config: Mapping[str, Any]
    layers: tuple[Located, ...]
    net: Net
    graph: Graph


def opened(model: ModelFile) -> Opened:
    """Read the configuration of a Keras file as a graph."""
    config = model.about.keras
    if config is None:
        raise InputError(
            f"{model.path} holds weights alone: nothing says how they are connected",
            hint="save the whole model, as .keras or .h5",
        )
    if not listed(config):
        raise InputError(
            f"{model.path} holds a model that is code: its configuration names no layers",
            hint="build it from layers with keras.Model(inputs, outputs), or export it to ONNX",
        )
    stored = Stored(model)
    layers = located(config, stored.container)
    leaves = bound(stored, layers)
    found: list[tuple[int, Net, tuple[str, ...]]] = []
    for length in _OPEN_LENGTHS:
        net = Net(model)
        walker = Walker(net, Caller(model.path, (), run), layers, leaves, length)
        try:
            outputs = walker.model(config, (), ())
        except InputError as error:
            raise InputError(f"{model.path}: {error.message}", hint=error.hint) from error
        unknown = sum(node.kind is Kind.UNKNOWN for node in net.nodes)
        found.append((unknown, net, outputs))
        if not walker.is_open:
            break
    _, net, outputs = min(found, key=_unknown)
    return Opened(model, stored, config, layers, net, net.graph(outputs))


def _unknown(found: tuple[int, Net, tuple[str, ...]]) -> int:
    return found[0]
