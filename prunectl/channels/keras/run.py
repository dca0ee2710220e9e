"""Running a Keras network on random numbers, in the Keras that it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from prunectl.channels.graph import Kind
from prunectl.channels.keras.draft import Draft, write
from prunectl.channels.keras.precision import calculating_in
from prunectl.channels.keras.read import Opened
from prunectl.channels.source import Feeds, Runner
from prunectl.errors import PrunectlError, WorkError, first_line
from prunectl.formats.base import Array
from prunectl.formats.scratch import temporary_folder
from prunectl.formats.table import open_model
from prunectl.training.keras import packing
from prunectl.training.keras.answers import flat
from prunectl.training.keras.library import Library, quietly
from prunectl.training.keras.loading import load
from prunectl.training.keras.place import Place
from prunectl.training.network import Origin

_FEW = 2
"""Whole numbers go up to here, so that any table of words has them."""


def feeds(opened: Opened, random: np.random.Generator) -> Feeds:
    """Return random inputs: numbers of words where they are looked up."""
    words = {node.inputs[1] for node in opened.graph.nodes if node.kind is Kind.EMBEDDING}
    return {name: _feed(opened, name, words, random) for name in opened.graph.inputs}


def runner(opened: Opened, draft: Draft, origin: Origin, shown: Iterable[str], *, precision: str) -> Runner:
    """Return what Keras makes of a draft: its outputs, and what some layers give before their activations."""
    config = calculating_in(precision, opened.config if draft.config is None else draft.config)
    with temporary_folder() as scratch:
        path = scratch / f"draft{'.keras' if opened.model.format == 'keras' else '.h5'}"
        write(opened, Draft(config, draft.arrays), path)
        try:
            loaded = load(open_model(path), origin, Place())
        except PrunectlError as error:
            said = error.message.replace(str(path), str(opened.model.path))
            raise type(error)(f"{said}; nothing was written", hint=error.hint) from error
        except Exception as error:
            raise WorkError(
                f"the network cannot be loaded by Keras: {first_line(error)}; nothing was written"
            ) from error
    names = tuple(shown)
    showable = opened.net.showable
    looks = {name: showable[name] for name in names}
    seen: dict[str, list[Any]] = {name: [] for name in looks}
    for name, look in looks.items():
        _listen(_layer(loaded.model, look.names), seen[name])

    def run(given: Feeds) -> list[Any]:
        for kept in seen.values():
            kept.clear()
        values = tuple(given[name] for name in opened.graph.inputs)
        with quietly():
            made = loaded.model(packing.inputs(loaded.model, values), training=False)
        outputs = [_array(loaded.library, one) for one in flat(made)]
        # A layer that is called for each step in time gives its steps one by one; in the graph they are a batch.
        inner = {name: np.concatenate([_array(loaded.library, one) for one in kept]) for name, kept in seen.items()}
        return [*outputs, *(inner[name].transpose(looks[name].order) for name in names)]

    return run


def _feed(opened: Opened, name: str, words: set[str], random: np.random.Generator) -> Array:
    shape, kind = opened.graph.shapes[name], opened.net.inputs[name]
    if kind == "string":
        raise WorkError(f"the network takes an input, {name}, of which nothing random can be made")
    if name in words or kind.startswith(("int", "uint", "bool")):
        return random.integers(0, _FEW, shape).astype(kind if name not in words else "int32")
    return random.standard_normal(shape).astype(np.float32)


def _layer(model: Any, names: Iterable[str]) -> Any:
    for name in names:
        model = model.get_layer(name) if hasattr(model, "get_layer") else model.layer
    return model


def _listen(layer: Any, kept: list[Any]) -> None:
    """Let a layer put down what it hands to its activation."""
    activation: Callable[[Any], Any] = layer.activation

    def listening(value: Any) -> Any:
        kept.append(value)
        return value if activation is None else activation(value)

    layer.activation = listening


def _array(library: Library, value: Any) -> Array:
    if library.is_two or library.is_on_tensorflow:
        return np.asarray(value)
    found: Array = library.keras.ops.convert_to_numpy(value)
    return found
