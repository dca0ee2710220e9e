"""Which loss? The user's, else the file's, else what fits the outputs and their targets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from typing import Any

import numpy as np

from prunectl.errors import UsageError
from prunectl.training import custom
from prunectl.training.ending import Ending
from prunectl.training.keras.answers import Answer
from prunectl.training.keras.library import Library
from prunectl.training.network import Array

_SHORT = {
    "mse": "MeanSquaredError",
    "mae": "MeanAbsoluteError",
    "kl": "KLDivergence",
    "hinge": "Hinge",
    "huber": "Huber",
}
_CROSS = "cross-entropy"
_CROSS_NAMES = frozenset({_CROSS, "ce", "crossentropy"})


class Kind(StrEnum):
    """Losses that prunectl has to know from each other."""

    SPARSE = "SparseCategoricalCrossentropy"
    CATEGORICAL = "CategoricalCrossentropy"
    BINARY = "BinaryCrossentropy"
    OTHER = ""

    @property
    def is_classification(self) -> bool:
        """Whether it compares classes."""
        return self is not Kind.OTHER


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss for one output."""

    kind: Kind
    what: Any
    """An object or a function that Keras takes."""
    is_of_logits: bool = False
    name: str = ""


_FUNCTIONS = {
    "sparse_categorical_crossentropy": Kind.SPARSE,
    "categorical_crossentropy": Kind.CATEGORICAL,
    "binary_crossentropy": Kind.BINARY,
}


def chosen(library: Library, answer: Answer, y: Array | None) -> Loss | None:
    """Return the loss that fits an output and its targets; none without targets."""
    if y is None:
        return None
    classes = _classes(answer, y)
    if classes is not None:
        return cross_entropy(library, classes, answer)
    return _instance(library, "MeanSquaredError")


def cross_entropy(library: Library, kind: Kind, answer: Answer) -> Loss:
    """Return a cross-entropy that takes what the model ends with."""
    is_of_logits = answer.ending is Ending.RAW
    what = getattr(library.keras.losses, kind.value)(from_logits=is_of_logits)
    return Loss(kind, what, is_of_logits, _snake(kind))


def wanted(library: Library, name: str, answer: Answer, y: Array | None) -> Loss:
    """Return the loss that a user asks for."""
    word = name.strip()
    if ":" in word:
        function = custom.function(word, "--loss")
        what = function() if isinstance(function, type) else function
        return known(what)
    if word.lower() in _CROSS_NAMES:
        return cross_entropy(library, _form(answer, y), answer)
    if word.lower() == "bce":
        return cross_entropy(library, Kind.BINARY, answer)
    if word.lower() == "kl" and answer.ending is Ending.RAW:
        return Loss(Kind.OTHER, _kl_of_logits(library), name="kl_divergence")
    if word.lower() in _SHORT:
        return _instance(library, _SHORT[word.lower()])
    found = known(_by_name(library, word))
    if found.kind.is_classification:
        return cross_entropy(library, found.kind, answer)
    return found


def _kl_of_logits(library: Library) -> Any:
    """Return the divergence of the model's probabilities from those of the targets, for a model that ends in logits."""
    keras = library.keras

    def kl_divergence_of_logits(y_true: Any, y_pred: Any) -> Any:
        return keras.losses.kl_divergence(y_true, keras.activations.softmax(y_pred))

    return kl_divergence_of_logits


def known(what: Any) -> Loss:
    """Return what prunectl knows of a loss of Keras."""
    name = getattr(what, "__name__", "") or _snake(type(what).__name__)
    kind = _FUNCTIONS.get(name, Kind.OTHER)
    settings = what.get_config() if kind is not Kind.OTHER and hasattr(what, "get_config") else {}
    return Loss(kind, what, bool(settings.get("from_logits", False)), name)


def of_file(library: Library, entry: Any, objects: Mapping[str, Any]) -> Any:
    """Return what a file calls a loss; an error of Keras if that is unknown here."""
    with library.keras.utils.custom_object_scope(dict(objects)):
        return library.keras.losses.deserialize(entry) if isinstance(entry, dict) else library.keras.losses.get(entry)


def fitted(library: Library, loss: Loss, answer: Answer, y: Array | None) -> tuple[Loss, str]:
    """Return a cross-entropy that takes targets as they come, and what was changed about it."""
    if y is None or loss.kind not in {Kind.SPARSE, Kind.CATEGORICAL}:
        return loss, ""
    form = _form(answer, y)
    if form is loss.kind or form is Kind.BINARY:
        return loss, ""
    what = getattr(library.keras.losses, form.value)(from_logits=loss.is_of_logits)
    shape = "numbers of classes" if form is Kind.SPARSE else "one-hot"
    note = f"The file's loss is {loss.name}, but the targets are {shape}: {_snake(form)} takes its place."
    return Loss(form, what, loss.is_of_logits, _snake(form)), note


_ELEMENTWISE = frozenset(
    {"mean_squared_error", "mean_absolute_error", "huber", "mean_squared_logarithmic_error", "log_cosh", "hinge"}
)
"""Losses that compare number with number, which TensorFlow would stretch where there are fewer targets."""


def check_shape(loss: Loss, answer: Answer, y: Array | None) -> None:
    """Refuse targets of another shape than the outputs that they are compared with."""
    shape = answer.shape[1:]
    if y is None or loss.name not in _ELEMENTWISE or any(size is None for size in shape):
        return
    if math.prod(y.shape[1:]) != math.prod(size or 1 for size in shape):
        mine, theirs = ("x".join(map(str, one)) or "a number" for one in (y.shape[1:], shape))
        raise UsageError(
            f"a target is {mine} for each example, and the output {answer.name} is {theirs}",
            hint="choose other targets (train.npz[x,y]), or a --loss that compares such as these",
        )


def _classes(answer: Answer, y: Array) -> Kind | None:
    """Return the cross-entropy for targets that say classes; None if they are measurements."""
    is_same = _is_same_shape(answer, y)
    if y.dtype.kind in "iub":
        return _form(answer, y)
    if answer.ending is Ending.SIGMOID and bool(np.all((y >= 0) & (y <= 1))):
        return Kind.BINARY
    if answer.ending is Ending.SOFTMAX:
        return Kind.CATEGORICAL if is_same else Kind.SPARSE
    return None


def _form(answer: Answer, y: Array | None) -> Kind:
    """Return the cross-entropy for the form of targets."""
    if answer.width == 1:
        return Kind.BINARY
    if y is None or not _is_same_shape(answer, y):
        return Kind.SPARSE
    return Kind.BINARY if answer.ending is Ending.SIGMOID else Kind.CATEGORICAL


def _is_same_shape(answer: Answer, y: Array) -> bool:
    return len(y.shape) == len(answer.shape) and (answer.width in {None, y.shape[-1]})


def _instance(library: Library, name: str) -> Loss:
    return Loss(Kind.OTHER, getattr(library.keras.losses, name)(), name=_snake(name))


def _by_name(library: Library, name: str) -> Any:
    try:
        found = library.keras.losses.get(name)
    except (ValueError, TypeError) as error:
        names = names_of(library)
        raise UsageError(
            f"no loss is called {name}",
            did_you_mean=tuple(get_close_matches(name, names, n=3, cutoff=0.5)),
            hint=f"known: {_CROSS}, bce, {', '.join(_SHORT)}, those of Keras, or my_module:my_loss",
        ) from error
    return found() if isinstance(found, type) else found


def names_of(library: Library) -> Sequence[str]:
    """Return what losses can be called."""
    theirs = [name for name in dir(library.keras.losses) if not name.startswith("_")]
    return [_CROSS, "bce", *_SHORT, *theirs]


def _snake(name: str) -> str:
    """Return the name of the function that a class of losses stands for."""
    spaced = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name)
    return spaced.lstrip("_")
