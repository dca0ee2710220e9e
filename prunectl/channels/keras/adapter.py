"""A Keras network that can be cut: its configuration and its weights, run by the Keras that wrote it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.channels.adapter import Feeds, PrunedShapes, RemovedIndices, Runner, axes_of, delete_indices
from prunectl.channels.graph import ChannelGraph
from prunectl.channels.keras import run as drafts
from prunectl.channels.keras.resize import resize_config
from prunectl.channels.keras.run import EditedFile, random_inputs, runner
from prunectl.channels.keras.traverse import LoadedKeras, load_keras
from prunectl.channels.lengths import Lengths, Shapes
from prunectl.errors import InputError, UsageError
from prunectl.formats.base import Array, ModelFile, Role, StripOptions, StripPart, Tensor
from prunectl.formats.keras.config import part
from prunectl.formats.registry import by_name, load, open_model
from prunectl.pruning import destination as outputs
from prunectl.training.backend import ModelOrigin

_STATISTICS = frozenset({"moving_mean", "moving_variance"})


def match_slots(opened: LoadedKeras) -> Mapping[str, str] | None:
    """Return the weight that each slot of the optimizer belongs to; None if that cannot be told for sure."""
    slots = _slots(opened)
    weights = list(_trained(opened))
    return _slots_by_name(slots, weights) or _by_place(opened, slots, weights)


def strange(opened: LoadedKeras) -> frozenset[str]:
    """Return the whole state of an optimizer of which nobody can tell which weights it belongs to."""
    if not _slots(opened) or match_slots(opened) is not None:
        return frozenset()
    return frozenset(tensor.name for tensor in opened.model.tensors if tensor.role is Role.OPTIMIZER)


def _slots(opened: LoadedKeras) -> list[Tensor]:
    return [tensor for tensor in opened.model.tensors if _is_slot(opened, tensor)]


def _is_slot(opened: LoadedKeras, tensor: Tensor) -> bool:
    path = opened.stored.path(tensor)
    return tensor.role is Role.OPTIMIZER and "optimizer" in path.partition("/")[0] and bool(tensor.shape)


def _trained(opened: LoadedKeras) -> Iterator[Tensor]:
    """Yield the weights that are trained, in the order of the layers."""
    known = {met.spot: met.leaves for met in opened.net.met}
    for layer in opened.layers:
        if part(layer.found, "config").get("trainable") is not False:
            for leaf, tensor in known.get(layer.spot, {}).items():
                if leaf not in _STATISTICS:
                    yield tensor


def _slots_by_name(slots: Sequence[Tensor], weights: Sequence[Tensor]) -> dict[str, str] | None:
    """Match where a slot has the name of a weight in its own: `Adam/m/a/kernel`, `adam/a_kernel_momentum`."""
    named = {re.sub(r":\d+$", "", tensor.name): tensor for tensor in weights}
    found = {}
    for slot in slots:
        path = f"/{re.sub(r':[0-9]+$', '', slot.name)}/"
        near = [
            name
            for name, tensor in named.items()
            if (f"/{name}/" in path or f"/{name.replace('/', '_')}_" in path) and tensor.shape == slot.shape
        ]
        longest = [name for name in near if len(name) == max(map(len, near))]
        if len(longest) != 1:
            return None
        found[slot.name] = named[longest[0]].name
    return found


def _by_place(opened: LoadedKeras, slots: Sequence[Tensor], weights: Sequence[Tensor]) -> dict[str, str] | None:
    """Match slots that have only numbers: weight by weight, or one kind of slot after the other."""
    ordered = sorted(slots, key=lambda tensor: _natural(opened.stored.path(tensor)))
    times, rest = divmod(len(ordered), len(weights)) if weights else (0, 1)
    if rest:
        return None
    turns = ([weight for weight in weights for _ in range(times)], [*weights] * times)
    fits = [turn for turn in turns if [one.shape for one in turn] == [slot.shape for slot in ordered]]
    found = [_paired(ordered, turn) for turn in fits]
    return found[0] if found and all(one == found[0] for one in found) else None


def _paired(slots: Sequence[Tensor], weights: Sequence[Tensor]) -> dict[str, str]:
    return {slot.name: weight.name for slot, weight in zip(slots, weights, strict=True)}


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(step), "") if step.isdecimal() else (0, step) for step in re.split(r"(\d+)", path)]


def read_keras(model: ModelFile, origin: ModelOrigin, data: Shapes | None = None) -> KerasSource:
    """Return the network of a Keras file, which says itself how it is built."""
    require_followable(model, origin)
    return KerasSource(load_keras(model, Lengths(origin.inputs, data)), origin)


def require_followable(model: ModelFile, origin: ModelOrigin) -> None:
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

    def __init__(self, source: LoadedKeras, origin: ModelOrigin) -> None:
        self._opened, self._origin = source, origin

    @property
    def graph(self) -> ChannelGraph:
        """What can be followed."""
        return self._opened.graph

    @property
    def copies(self) -> Mapping[str, str]:
        """Nothing: a layer that is called twice has its weights once."""
        return {}

    @cached_property
    def followers(self) -> Mapping[str, str]:
        """What the optimizer keeps of each weight, where that can be told."""
        return match_slots(self._opened) or {}

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

    def cut(self, removed: RemovedIndices, after: PrunedShapes, weights: Mapping[str, Array]) -> Any:
        """Return what changes in the file."""
        places = axes_of(removed)
        arrays = dict(weights)
        for name, axes in places.items():
            arrays[name] = delete_indices(weights.get(name, self.graph.weights[name]), axes)
        model = self._opened.model
        tensors = {tensor.name: tensor for tensor in model.tensors}
        for slot, name in self.followers.items():
            if name in places:
                arrays[slot] = delete_indices(model.read(tensors[slot]), places[name])
        shapes = {name: array.shape for name, array in arrays.items()}
        return EditedFile(resize_config(self._opened.config, self._opened.net, after, shapes), arrays)

    def with_weights(self, weights: Mapping[str, Array]) -> Any:
        """Return the file with other numbers in it."""
        return EditedFile(None, weights)

    def feeds(self, random: np.random.Generator) -> Feeds:
        """Return random inputs."""
        return random_inputs(self._opened, random)

    @property
    def has_float64(self) -> bool:
        """Always: a configuration says of each layer what it calculates in."""
        return True

    def runner(self, network: Any, shown: Iterable[str], *, is_wide: bool = False) -> Runner:
        """Return what Keras makes of a draft."""
        return runner(self._opened, network, self._origin, shown, precision="float64" if is_wide else "float32")

    def write(self, network: Any, folder: Path, target: Path) -> Path:
        """Write a draft as a file like the one that was read."""
        written = outputs.staged_paths(self._opened.model, folder, target)[self._opened.model.path]
        drafts.write(self._opened, network, written)
        if self.dropped:
            whole = written.with_name(f"{written.name}.whole")
            os.replace(written, whole)
            wish = StripOptions(frozenset({StripPart.OPTIMIZER}))
            load(by_name(self._opened.model.format).stripper)(open_model(whole), wish, {whole: written})
            whole.unlink()
        return written
