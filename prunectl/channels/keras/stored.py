"""The weights of a Keras file with their paths in HDF5, inside an archive or not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from prunectl.formats.base import ModelFile, Role, Tensor
from prunectl.formats.keras import hdf5
from prunectl.formats.keras.archive import WEIGHTS
from prunectl.formats.keras.hdf5 import Contents
from prunectl.formats.keras.hdf5_walk import Place
from prunectl.formats.keras.leftovers_named import root_of
from prunectl.formats.scratch import Scratch
from prunectl.formats.zips import open_archive


class Stored:
    """What a file holds: a scratch copy of the weights of an archive lives as long as this."""

    def __init__(self, model: ModelFile) -> None:
        self.model = model
        self._scratch: Scratch | None = None
        self.file = model.path if model.format == "keras-h5" else self._taken_out()
        self.contents: Contents = hdf5.read_contents(Place(self.file, 0, self.file.stat().st_size))
        self.root = root_of(self.contents)
        self._keys = {found.storage.key: found.name for found in self.contents.datasets}

    def _taken_out(self) -> Path:
        self._scratch = Scratch()
        weights = self._scratch.path / WEIGHTS
        archive = open_archive(self.model.path)
        with weights.open("wb") as file:
            file.writelines(archive.pieces(archive.entries[WEIGHTS]))
        return weights

    def path(self, tensor: Tensor) -> str:
        """Return where a tensor stands in the HDF5 file."""
        return self._keys[tensor.storage.key]

    @property
    def numbered(self) -> Mapping[str, tuple[Tensor, ...]]:
        """Weights that have only numbers, by their layer's path."""
        found: dict[str, list[tuple[int, Tensor]]] = {}
        for tensor in self.model.tensors:
            owner, marker, number = self.path(tensor).rpartition("/vars/")
            if marker and number.isdecimal() and tensor.role is not Role.OPTIMIZER:
                found.setdefault(owner, []).append((int(number), tensor))
        return {owner: tuple(tensor for _, tensor in sorted(some, key=_first)) for owner, some in found.items()}

    @property
    def named(self) -> Mapping[str, tuple[Named, ...]]:
        """Weights that have names, by the layer of the model that they are in, in the order of Keras."""
        tensors = {self.path(tensor): tensor for tensor in self.model.tensors}
        root = self.root or ""
        found: dict[str, tuple[Named, ...]] = {}
        for group in self.contents.names(root, "layer_names"):
            inside = f"{root}/{group}" if root else group
            names = self.contents.names(inside, "weight_names")
            held = [(name, tensors.get(f"{inside}/{name}")) for name in names]
            found[group] = tuple(Named(*_steps(name), tensor) for name, tensor in held if tensor is not None)
        return found


@dataclass(frozen=True, slots=True)
class Named:
    """A weight with the name that Keras gives it."""

    steps: tuple[str, ...]
    """Names on the way to it."""
    leaf: str
    tensor: Tensor


def _steps(name: str) -> tuple[tuple[str, ...], str]:
    *steps, leaf = re.sub(r":\d+$", "", name).split("/")
    return tuple(steps), leaf


def _first(pair: tuple[int, Tensor]) -> int:
    return pair[0]
