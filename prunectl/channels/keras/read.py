"""From a Keras file to a graph that can be followed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prunectl.channels.graph import Graph, Kind
from prunectl.channels.keras.bind import bound, expected
from prunectl.channels.keras.net import Net, Shape
from prunectl.channels.keras.spots import Located, located
from prunectl.channels.keras.stored import Stored
from prunectl.channels.keras.walk import Walker
from prunectl.channels.lengths import NOTHING, TRIED, Lengths
from prunectl.errors import InputError
from prunectl.formats.base import ModelFile
from prunectl.formats.keras.config import Layer, listed
from prunectl.formats.keras.layer_calls import Caller
from prunectl.formats.keras.model_calls import run
from prunectl.formats.keras.numbering import doubtful, slots_of
from prunectl.training.signature import Port, Signature


@dataclass(frozen=True, slots=True)
class Opened:
    """A Keras file, and what was read from it."""

    model: ModelFile
    stored: Stored
    config: Mapping[str, Any]
    layers: tuple[Located, ...]
    net: Net
    graph: Graph
    guessed: int = 0
    """How long open axes were taken to be where some layers did not fit that; 0 where all fit, or it was said."""


def opened(model: ModelFile, lengths: Lengths = NOTHING) -> Opened:
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
    slots = slots_of(config, stored.contents.datasets)
    layers = located(config, slots)
    if stored.root is None and any(expected(layer.found) and not layer.slots for layer in layers):
        _refuse_doubt(stored, config, slots)
    leaves = bound(stored, layers)

    def followed(length: int, said: Mapping[str, Shape]) -> _Followed:
        net = Net(model)
        walker = Walker(net, Caller(model.path, (), run), layers, leaves, length, said=said)
        try:
            outputs = walker.model(config, (), ())
        except InputError as error:
            raise InputError(f"{model.path}: {error.message}", hint=error.hint) from error
        unknown = sum(node.kind is Kind.UNKNOWN for node in net.nodes)
        return _Followed(unknown, net, outputs, walker.open, length)

    tries = [followed(TRIED[0], {})]
    said = lengths.of(_signature(tries[0]))
    if said and tries[0].open:
        tries = [followed(TRIED[0], said)]
    elif tries[0].open:
        tries += [followed(length, {}) for length in TRIED[1:]]
    best = min(tries, key=lambda one: one.unknown)
    guessed = best.length if best.open and best.unknown and not said else 0
    return Opened(model, stored, config, layers, best.net, best.net.graph(best.outputs), guessed)


def _refuse_doubt(stored: Stored, config: Mapping[str, Any], slots: Mapping[str, Layer]) -> None:
    """Refuse weights that belong to layers of the configuration, and nobody knows to which."""
    if doubtful(config, slots, [found.name for found in stored.contents.datasets]):
        raise InputError(
            f"{stored.model.path} holds weights that do not fit the layers of its configuration by number and shape",
            hint="load it in the Keras that wrote it, save it again, and prune that file",
        )


@dataclass(frozen=True, slots=True)
class _Followed:
    """A configuration that was followed with open axes of some length."""

    unknown: int
    """How many operations nothing is known of."""
    net: Net
    outputs: tuple[str, ...]
    open: Mapping[str, tuple[int | None, ...]]
    """The shapes of inputs as the file says them, without the batch, where that is not all."""
    length: int


def _signature(found: _Followed) -> Signature:
    shapes = {name: found.open.get(name, found.net.shapes[name][1:]) for name in found.net.inputs}
    ports = tuple(Port(name, shapes[name], kind) for name, kind in found.net.inputs.items())
    return Signature(ports, (), is_channels_first=False)
