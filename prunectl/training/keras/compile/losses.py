"""Which loss? The user's, else the file's, else what fits the outputs and their targets."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from functools import wraps
from typing import Any

import numpy as np

from prunectl.errors import UsageError
from prunectl.formats.keras.config import part, text
from prunectl.training import user_code
from prunectl.training.backend import Array, Ending
from prunectl.training.keras.backend import Library
from prunectl.training.keras.compile.outputs import Answer, flat
from prunectl.training.monitor import unfitting

_SHORT = {
    "mse": "MeanSquaredError",
    "mae": "MeanAbsoluteError",
    "kl": "KLDivergence",
    "hinge": "Hinge",
    "huber": "Huber",
}
_CROSS = "cross-entropy"
_CROSS_NAMES = frozenset({_CROSS, "ce", "crossentropy"})


class LossKind(StrEnum):
    """Losses that prunectl has to know from each other."""

    SPARSE = "SparseCategoricalCrossentropy"
    CATEGORICAL = "CategoricalCrossentropy"
    BINARY = "BinaryCrossentropy"
    OTHER = ""

    @property
    def is_classification(self) -> bool:
        """Whether it compares classes."""
        return self is not LossKind.OTHER


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss for one output."""

    kind: LossKind
    what: Any
    """An object or a function that Keras takes."""
    is_of_logits: bool = False
    name: str = ""


_FUNCTIONS = {
    "sparse_categorical_crossentropy": LossKind.SPARSE,
    "categorical_crossentropy": LossKind.CATEGORICAL,
    "binary_crossentropy": LossKind.BINARY,
}


def chosen(library: Library, answer: Answer, y: Array | None) -> Loss | None:
    """The loss that fits an output and its targets; none without targets."""
    if y is None:
        return None
    classes = _classes(answer, y)
    if classes is not None:
        return cross_entropy(library, classes, answer)
    return _instance(library, "MeanSquaredError")


def cross_entropy(library: Library, kind: LossKind, answer: Answer) -> Loss:
    """A cross-entropy that takes what the model ends with."""
    is_of_logits = answer.ending is Ending.RAW
    what = getattr(library.keras.losses, kind.value)(from_logits=is_of_logits)
    return Loss(kind, what, is_of_logits, _snake(kind))


def wanted_losses(library: Library, name: str, answer: Answer, y: Array | None) -> Loss:
    """The loss that a user asks for."""
    word = name.strip()
    if ":" in word:
        function = user_code.function(word, "--loss")
        what = function() if isinstance(function, type) else function
        return known(what)
    if word.lower() in _CROSS_NAMES:
        return cross_entropy(library, _form(answer, y), answer)
    if word.lower() == "bce":
        return cross_entropy(library, LossKind.BINARY, answer)
    if word.lower() == "kl" and answer.ending is Ending.RAW:
        return Loss(LossKind.OTHER, _kl_of_logits(library), name="kl_divergence")
    if word.lower() in _SHORT:
        return _instance(library, _SHORT[word.lower()])
    found = known(_by_name(library, word))
    if found.kind.is_classification:
        return cross_entropy(library, found.kind, answer)
    return found


def _kl_of_logits(library: Library) -> Any:
    """The divergence of the model's probabilities from those of the targets, for a model that ends in logits."""
    keras = library.keras

    def kl_divergence_of_logits(y_true: Any, y_pred: Any) -> Any:
        return keras.losses.kl_divergence(y_true, keras.activations.softmax(y_pred))

    return kl_divergence_of_logits


def known(what: Any) -> Loss:
    """What prunectl knows of a loss of Keras."""
    name = getattr(what, "__name__", "") or _snake(type(what).__name__)
    kind = _FUNCTIONS.get(name, LossKind.OTHER)
    settings = what.get_config() if kind is not LossKind.OTHER and hasattr(what, "get_config") else {}
    return Loss(kind, what, bool(settings.get("from_logits", False)), name)


def losses_of_file(library: Library, entry: Any, objects: Mapping[str, Any]) -> Any:
    """What a file calls a loss; an error of Keras if that is unknown here."""
    with library.keras.utils.custom_object_scope(dict(objects)):
        return library.keras.losses.deserialize(entry) if isinstance(entry, dict) else library.keras.losses.get(entry)


def fitted(library: Library, loss: Loss, answer: Answer, y: Array | None) -> tuple[Loss, str]:
    """A cross-entropy that takes targets as they come, and what was changed about it."""
    if y is None or loss.kind not in {LossKind.SPARSE, LossKind.CATEGORICAL}:
        return loss, ""
    form = _form(answer, y)
    if form is loss.kind or form is LossKind.BINARY:
        return loss, ""
    what = getattr(library.keras.losses, form.value)(from_logits=loss.is_of_logits)
    shape = "numbers of classes" if form is LossKind.SPARSE else "one-hot"
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


def _classes(answer: Answer, y: Array) -> LossKind | None:
    """The cross-entropy for targets that say classes; None if they are measurements."""
    is_same = _is_same_shape(answer, y)
    if y.dtype.kind in "iub":
        return _form(answer, y)
    if answer.ending is Ending.SIGMOID and bool(np.all((y >= 0) & (y <= 1))):
        return LossKind.BINARY
    if answer.ending is Ending.SOFTMAX:
        return LossKind.CATEGORICAL if is_same else LossKind.SPARSE
    return None


def _form(answer: Answer, y: Array | None) -> LossKind:
    """The cross-entropy for the form of targets."""
    if answer.width == 1:
        return LossKind.BINARY
    if y is None or not _is_same_shape(answer, y):
        return LossKind.SPARSE
    return LossKind.BINARY if answer.ending is Ending.SIGMOID else LossKind.CATEGORICAL


def _is_same_shape(answer: Answer, y: Array) -> bool:
    return len(y.shape) == len(answer.shape) and (answer.width in {None, y.shape[-1]})


def _instance(library: Library, name: str) -> Loss:
    return Loss(LossKind.OTHER, getattr(library.keras.losses, name)(), name=_snake(name))


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
    """What losses can be called."""
    theirs = [name for name in dir(library.keras.losses) if not name.startswith("_")]
    return [_CROSS, "bce", *_SHORT, *theirs]


def _snake(name: str) -> str:
    """The name of the function that a class of losses stands for."""
    spaced = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name)
    return spaced.lstrip("_")


ACCURACY = frozenset({"accuracy", "acc"})
_ACCURACIES = ACCURACY | {"sparse_categorical_accuracy", "categorical_accuracy"}
"""What files call it; which of them it is the targets decide."""
_TOP = re.compile(r"top-?_?(\d+)(?:-?_?accuracy)?")


_NUMBER_BY_NUMBER = frozenset({"mae", "mse", "mape", "msle", "rmse", "logcosh", "r2_score"})
"""What compares number with number, beside all that end with `_error`: Keras may stretch targets that are fewer."""


def default(library: Library, loss: Loss | None, answer: Answer, y: Array | None) -> list[Any]:
    """What is looked at if nobody says."""
    if loss is None:
        return []
    if loss.kind.is_classification:
        return [accuracy(library, loss)]
    if not _is_as_wide(answer, y):
        is_label = y is not None and y.dtype.kind in "iub" and (answer.width or 0) > 1
        return [library.keras.metrics.SparseCategoricalAccuracy(name="accuracy")] if is_label else []
    return [] if loss.name == "mean_absolute_error" else [library.keras.metrics.MeanAbsoluteError(name="mae")]


def check_metric_shape(name: str, answer: Answer, y: Array | None) -> None:
    """Refuse a metric that compares number with number where there are more of the one."""
    word = name.strip().lower()
    if y is not None and (word in _NUMBER_BY_NUMBER or word.endswith("_error")) and not _is_as_wide(answer, y):
        raise unfitting(name, [0, *(size or 0 for size in answer.shape[1:])], y.shape)


def _is_as_wide(answer: Answer, y: Array | None) -> bool:
    """Whether a target has as many numbers as the output, as far as it is known."""
    shape = answer.shape[1:]
    if y is None or None in shape:
        return True
    return math.prod(y.shape[1:]) == math.prod(size or 1 for size in shape)


def wanted_metrics(library: Library, name: str, loss: Loss | None, objects: Mapping[str, Any]) -> Any:
    """The metric that a user asks for, by a name that Keras knows or the custom objects."""
    word = name.strip()
    if ":" in word:
        found = user_code.function(word, "--metric")
        return found() if isinstance(found, type) else _by_example(library, found)
    if word.lower() in ACCURACY:
        return accuracy(library, loss)
    if top := _TOP.fullmatch(word.lower()):
        return _top(library, int(top[1]), loss)
    classes = {one.__name__.lower(): one for one in _metric_classes(library)}
    if word.lower().replace("-", "") in classes:
        return classes[word.lower().replace("-", "")](name=word.lower())
    try:
        with library.keras.utils.custom_object_scope(dict(objects)):
            found = library.keras.metrics.get(word)
        if isinstance(found, str):  # Keras 2 hands back what it does not know
            raise ValueError(found)  # noqa: TRY004, TRY301
    except (ValueError, TypeError) as error:
        names = [*ACCURACY, *classes, *(name for name in dir(library.keras.metrics) if name.islower())]
        raise UsageError(
            f"no metric is called {name}",
            did_you_mean=tuple(get_close_matches(word.lower(), names, n=3, cutoff=0.5)),
            hint="known: accuracy, top5, auc, precision, recall, mae, those of Keras, or my_module:my_metric",
        ) from error
    # A function gets the name that the user knows it by, a metric object has its own.
    return library.keras.metrics.MeanMetricWrapper(found, name=word) if not hasattr(found, "result") else found


def _by_example(library: Library, function: Any) -> Any:
    """A function whose one number for a batch counts for each example of it: the last batch may be smaller."""
    maths = library.tensorflow if library.is_two else library.keras.ops

    @wraps(function)
    def measured(y_true: Any, y_pred: Any) -> Any:
        found = function(y_true, y_pred)
        if len(getattr(found, "shape", ())):
            return found
        first = flat(y_pred)[0]
        each = first[(slice(None), *([0] * (len(first.shape) - 1)))]
        return found + maths.cast(maths.zeros_like(each), getattr(found, "dtype", "float32"))

    return measured


def accuracy(library: Library, loss: Loss | None) -> Any:
    """The accuracy that fits the targets of a loss."""
    metrics = library.keras.metrics
    if loss is None or loss.kind is LossKind.OTHER:
        return "accuracy"  # Keras decides by the shapes that it sees
    if loss.kind is LossKind.BINARY:
        return metrics.BinaryAccuracy(name="accuracy", threshold=0.0 if loss.is_of_logits else 0.5)
    if loss.kind is LossKind.SPARSE:
        return metrics.SparseCategoricalAccuracy(name="accuracy")
    return metrics.CategoricalAccuracy(name="accuracy")


def metrics_of_file(library: Library, entry: Any, objects: Mapping[str, Any]) -> Any:
    """What a file calls a metric; an error of Keras if that is unknown here."""
    # Keras writes down what it took accuracy for, which may have been wrong before it had seen a target.
    if (entry if isinstance(entry, str) else text(part(entry, "config"), "name")) in _ACCURACIES:
        return "accuracy"
    if isinstance(entry, str):
        with library.keras.utils.custom_object_scope(dict(objects)):
            known = library.keras.metrics.get(entry)
        if isinstance(known, str):
            raise ValueError(entry)  # noqa: TRY004 - Keras 2 hands back what it does not know
        return entry
    with library.keras.utils.custom_object_scope(dict(objects)):
        return library.keras.metrics.deserialize(entry)


def _top(library: Library, count: int, loss: Loss | None) -> Any:
    is_sparse = loss is not None and loss.kind is LossKind.SPARSE
    kind = "SparseTopKCategoricalAccuracy" if is_sparse else "TopKCategoricalAccuracy"
    return getattr(library.keras.metrics, kind)(k=count, name=f"top{count}")


def _metric_classes(library: Library) -> list[type]:
    metrics = library.keras.metrics
    found = [getattr(metrics, name) for name in dir(metrics) if not name.startswith("_")]
    return [one for one in found if isinstance(one, type) and issubclass(one, metrics.Metric)]
