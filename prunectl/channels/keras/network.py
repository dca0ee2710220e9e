"""A Keras network that can be cut: its configuration and its weights, run by the Keras that wrote it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.channels.after import After
from prunectl.channels.graph import Graph
from prunectl.channels.keras import draft as drafts
from prunectl.channels.keras.draft import Draft
from prunectl.channels.keras.read import Opened, opened
from prunectl.channels.keras.run import feeds, runner
from prunectl.channels.keras.settings import rewritten
from prunectl.channels.keras.slots import matched, strange
from prunectl.channels.lengths import Lengths, Shapes
from prunectl.channels.source import Feeds, Removed, Runner, axes_of, sliced
from prunectl.errors import InputError, UsageError
from prunectl.formats.base import Array, ModelFile
from prunectl.formats.stripping import Part, Wish
from prunectl.formats.table import by_name, load, open_model
from prunectl.pruning import output as outputs
from prunectl.training.network import Origin


def read(model: ModelFile, origin: Origin, data: Shapes | None = None) -> KerasSource:
    """Return the network of a Keras file, which says itself how it is built."""
    require_followable(model, origin)
    return KerasSource(opened(model, Lengths(origin.inputs, data)), origin)


def require_followable(model: ModelFile, origin: Origin) -> None:
    """Refuse what cannot be followed, or needs no words."""
    if origin.model:
        raise UsageError(
            "--model does not go with channels of a Keras file, whose own configuration is followed",
            hint="save the model that it builds as .keras, and prune that",
        )
    if model.about.wrappers:
        raise InputError(
            f"{model.path} has its layers in wrappers of tfmot, which hide them",
            hint=f"take them off first: prunectl strip {model.path} --only masks,wrappers",
        )


class KerasSource:
    """A Keras file, as cutting sees it."""

    def __init__(self, source: Opened, origin: Origin) -> None:
        self._opened, self._origin = source, origin

    @property
    def graph(self) -> Graph:
        """What can be followed."""
        return self._opened.graph

    @property
    def copies(self) -> Mapping[str, str]:
        """Nothing: a layer that is called twice has its weights once."""
        return {}

    @cached_property
    def followers(self) -> Mapping[str, str]:
        """What the optimizer keeps of each weight, where that can be told."""
        return matched(self._opened) or {}

    @cached_property
    def dropped(self) -> frozenset[str]:
        """The state of an optimizer that cannot be cut as its weights are."""
        return strange(self._opened)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is left out."""
        if not self.dropped:
            return ()
        return ("The state of the optimizer was left out: which weights it belongs to cannot be told.",)

    @property
    def doubts(self) -> tuple[str, ...]:
        """How long open axes were taken to be, where some layers do not fit that."""
        guessed = self._opened.guessed
        if not guessed:
            return ()
        how = "--input or --data says how long they are"
        return (f"Open axes were taken to be {guessed} long, and layers that do not fit lock their channels: {how}.",)

    @property
    def showable(self) -> frozenset[str]:
        """What layers that are called once make before their activations."""
        return frozenset(self._opened.net.showable)

    def beside(self, target: Path) -> tuple[Path, ...]:
        """Return nothing: a Keras model is one file."""
        del target
        return ()

    def cut(self, removed: Removed, after: After, weights: Mapping[str, Array]) -> Any:
        """Return what changes in the file."""
        places = axes_of(removed)
        arrays = dict(weights)
        for name, axes in places.items():
            arrays[name] = sliced(weights.get(name, self.graph.weights[name]), axes)
        model = self._opened.model
        tensors = {tensor.name: tensor for tensor in model.tensors}
        for slot, name in self.followers.items():
            if name in places:
                arrays[slot] = sliced(model.read(tensors[slot]), places[name])
        shapes = {name: array.shape for name, array in arrays.items()}
        return Draft(rewritten(self._opened.config, self._opened.net, after, shapes), arrays)

    def with_weights(self, weights: Mapping[str, Array]) -> Any:
        """Return the file with other numbers in it."""
        return Draft(None, weights)

    def feeds(self, random: np.random.Generator) -> Feeds:
        """Return random inputs."""
        return feeds(self._opened, random)

    @property
    def has_float64(self) -> bool:
        """Always: a configuration says of each layer what it calculates in."""
        return True

    def runner(self, network: Any, shown: Iterable[str], *, is_wide: bool = False) -> Runner:
        """Return what Keras makes of a draft."""
        return runner(self._opened, network, self._origin, shown, precision="float64" if is_wide else "float32")

    def write(self, network: Any, folder: Path, target: Path) -> Path:
        """Write a draft as a file like the one that was read."""
        written = outputs.places(self._opened.model, folder, target)[self._opened.model.path]
        drafts.write(self._opened, network, written)
        if self.dropped:
            whole = written.with_name(f"{written.name}.whole")
            os.replace(written, whole)
            wish = Wish(frozenset({Part.OPTIMIZER}))
            load(by_name(self._opened.model.format).stripper)(open_model(whole), wish, {whole: written})
            whole.unlink()
        return written
