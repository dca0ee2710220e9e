"""A SavedModel of any origin that is trained through what it serves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from prunectl.errors import UsageError
from prunectl.formats.base import ModelFile
from prunectl.training.evidence import Evidence
from prunectl.training.keras import numbers
from prunectl.training.keras.library import keras_two
from prunectl.training.keras.loading import Loaded
from prunectl.training.keras.network import KerasNetwork
from prunectl.training.keras.place import Place
from prunectl.training.network import Array
from prunectl.training.signature import Signature
from prunectl.training.tensorflow.served import Served, served


class ServedNetwork(KerasNetwork):
    """Trained as any Keras model, by the names that the file gives its variables."""

    _model: Served

    def _begin(self) -> None:
        super()._begin()
        copies = self._loaded.file.copies
        # What is held twice goes by the name of the first.
        self._variables = {copies.get(name, name): one for name, one in self._variables.items()}
        # What is served has nothing random in it that could be begun anew.
        self._chance.is_traced = False
        self._unserved: dict[str, Array] = {}

    @property
    def signature(self) -> Signature:
        """What goes in and comes out, as the file says."""
        inputs, outputs = self._model.ports
        return self._ended(Signature(inputs, outputs, is_channels_first=False))

    @property
    def notes(self) -> tuple[str, ...]:
        """What was chosen for want of a word, and how it is trained."""
        found: tuple[str, ...] = (
            "It is trained as it predicts: its dropout drops nothing, its batch normalisation does not learn.",
        )
        piece = self._model.piece
        if piece is not None:
            found += (f"It was saved for {piece} at a time: every batch goes through it in such pieces.",)
        return (*super().notes, *found)

    def weights(self, names: Iterable[str]) -> dict[str, Array]:
        """Return copies of some weights; of what is not served as well, which only the file holds."""
        wanted = tuple(names)
        found = super().weights(name for name in wanted if name in self._variables)
        return {name: found[name] if name in found else self._read(name).copy() for name in wanted}

    def _read(self, name: str) -> Array:
        if name not in self._unserved:
            file = self._loaded.file
            self._unserved[name] = np.array(file.read(next(one for one in file.tensors if one.name == name)))
        return self._unserved[name]

    def tensors(self) -> dict[str, Array]:
        """Return copies of all that is served, and of what was asked for beside."""
        return {**super().tensors(), **{name: value.copy() for name, value in self._unserved.items()}}

    def assign(self, values: Mapping[str, Array]) -> None:
        """Replace the numbers of some tensors."""
        super().assign({name: value for name, value in values.items() if name in self._variables})
        self._unserved.update({name: np.array(value) for name, value in values.items() if name not in self._variables})

    def mask(self, masks: Mapping[str, Array]) -> None:
        """Zero what the masks do not keep, from now on."""
        super().mask({name: mask for name, mask in masks.items() if name in self._variables})
        for name, mask in masks.items():
            if name not in self._variables:
                value = self._read(name)
                self._unserved[name] = np.where(mask, value, np.zeros((), value.dtype))

    def watch(self, evidence: Evidence, names: Sequence[str]) -> None:
        """Gather evidence about some weights."""
        for name in names:
            if name not in self._variables:
                raise UsageError(
                    f"{name} has no part in what {self._loaded.file.path} serves, and so no gradient",
                    hint=f"leave it out: --exclude {name}",
                )
        super().watch(evidence, names)


def load(model: ModelFile, place: Place) -> Loaded:
    """Return what a SavedModel serves, made in some place."""
    library = keras_two()
    with place.scope(library):
        found = served(model.path)

    def fill(path: Path) -> None:
        with place.scope(library):
            other = served(path)
        for mine, theirs in zip(found.held, other.held, strict=True):
            numbers.write(library, mine, numbers.read(library, theirs))

    return Loaded(found, library, model, {}, fill, is_whole=False)
