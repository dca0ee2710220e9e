"""Training SavedModels that are no Keras models."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.errors import InputError, UsageError, first_line
from prunectl.formats.base import ModelFile
from prunectl.training import user_code
from prunectl.training.backend import Array, Evidence, ModelOrigin, Network, Port, Signature
from prunectl.training.keras import backend
from prunectl.training.keras.backend import keras_two, quietly
from prunectl.training.keras.distribution import DevicePlacement
from prunectl.training.keras.load import Loaded
from prunectl.training.keras.model import KerasNetwork


def open_network(model: ModelFile, origin: ModelOrigin) -> Network:
    """A model as TensorFlow trains it."""
    user_code.check(model, origin)
    keras_two()
    if origin.model:
        keras = importlib.import_module("prunectl.training.keras.model")
        built: Network = keras.open_network(model, origin)
        return built
    inside = importlib.import_module("prunectl.training.tensorflow")
    found: Network = inside.ServedNetwork(partial(inside.load, model))
    return found


_DEFAULT = "serving_default"
_Base: Any = keras_two().keras.Model
_tf = keras_two().tensorflow


class Served(_Base):  # type: ignore[misc]
    """A model that answers as the signature does."""

    def __init__(self, function: Any, root: Any) -> None:
        super().__init__()
        # Kept alive beside the function, which holds its variables weakly.
        self._root = [lambda: root]
        self._function = function
        # By their names: a signature knows no other order.
        self._specs: Mapping[str, Any] = dict(sorted(function.structured_input_signature[1].items()))
        self._answers = tuple(sorted(function.structured_outputs))
        self.held = list(function.variables)

    @property
    def piece(self) -> int | None:
        """How many examples it takes at a time, if it takes so many only."""
        sizes = {spec.shape[0] for spec in self._specs.values() if spec.shape.rank}
        return next((int(size) for size in sizes if size is not None), None)

    @property
    def ports(self) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
        """What goes in and what comes out."""
        outputs = self._function.structured_outputs
        return (
            tuple(_port(name, spec) for name, spec in self._specs.items()),
            tuple(_port(name, outputs[name]) for name in self._answers),
        )

    def call(self, inputs: Any) -> Any:
        """The answers for a batch of any size."""
        given = [_tf.cast(one, spec.dtype) for one, spec in zip(_each(inputs), self._specs.values(), strict=True)]
        found = self._serve(given) if self.piece is None else self._in_pieces(given, self.piece)
        return found if len(found) > 1 else found[0]

    def _serve(self, given: Sequence[Any]) -> list[Any]:
        answers = self._function(**dict(zip(self._specs, given, strict=True)))
        return [answers[name] for name in self._answers]

    def _in_pieces(self, given: Sequence[Any], size: int) -> list[Any]:
        """Fill the last piece up with its last example, whose answers are left out and so teach nothing."""
        count = _tf.shape(given[0])[0]
        filled = [_tf.concat([one, _tf.repeat(one[-1:], -count % size, axis=0)], axis=0) for one in given]
        pieces = [_tf.reshape(one, [-1, size, *one.shape[1:]]) for one in filled]
        kinds = [self._function.structured_outputs[name].dtype for name in self._answers]
        found = _tf.map_fn(self._serve, pieces, fn_output_signature=kinds)
        return [_tf.reshape(one, _tf.concat([[-1], _tf.shape(one)[2:]], axis=0))[:count] for one in found]


def served(path: Path) -> Served:
    """The model that a SavedModel serves."""
    try:
        with quietly():
            root = _tf.saved_model.load(str(path))
    except Exception as error:
        line = first_line(error)
        raise InputError(f"{path} cannot be loaded by this TensorFlow: {line}") from error
    names = list(root.signatures)
    if not names:
        raise InputError(
            f"{path} serves nothing: it has variables, and no function that says how they are used",
            hint="save it with signatures=, or build the model with --model mod:fn",
        )
    function = root.signatures[_DEFAULT if _DEFAULT in names else names[0]]
    if not function.trainable_variables:
        raise InputError(f"{path} has no variables that can be trained: they were frozen into constants")
    return Served(function, root)


def _each(inputs: Any) -> list[Any]:
    return list(inputs) if isinstance(inputs, list | tuple) else [inputs]


def _port(name: str, spec: Any) -> Port:
    dims = None if spec.shape.rank is None else tuple(None if n is None else int(n) for n in spec.shape)[1:]
    return Port(name, dims, spec.dtype.name)


class ServedNetwork(KerasNetwork):
    """Trained as any Keras model, by the names that the file gives its variables."""

    _model: Served

    def _begin(self) -> None:
        super()._begin()
        copies = self._loaded.file.duplicates
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
        """Copies of some weights; of what is not served as well, which only the file holds."""
        wanted = tuple(names)
        found = super().weights(name for name in wanted if name in self._variables)
        return {name: found[name] if name in found else self._read(name).copy() for name in wanted}

    def _read(self, name: str) -> Array:
        if name not in self._unserved:
            file = self._loaded.file
            self._unserved[name] = np.array(file.read(next(one for one in file.tensors if one.name == name)))
        return self._unserved[name]

    def tensors(self) -> dict[str, Array]:
        """Copies of all that is served, and of what was asked for beside."""
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


def load(model: ModelFile, place: DevicePlacement) -> Loaded:
    """What a SavedModel serves, made in some place."""
    library = keras_two()
    with place.scope(library):
        found = served(model.path)

    def fill(path: Path) -> None:
        with place.scope(library):
            other = served(path)
        for mine, theirs in zip(found.held, other.held, strict=True):
            backend.write(library, mine, backend.read(library, theirs))

    return Loaded(found, library, model, {}, fill, is_whole=False)
