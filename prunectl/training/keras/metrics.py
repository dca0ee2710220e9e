"""Which numbers tell how good a model is, besides its loss?"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from difflib import get_close_matches
from functools import wraps
from typing import Any

from prunectl.errors import UsageError
from prunectl.formats.keras.config import part, text
from prunectl.training import custom
from prunectl.training.judging.fitting import unfitting
from prunectl.training.keras.answers import Answer, flat
from prunectl.training.keras.library import Library
from prunectl.training.keras.losses import Kind, Loss
from prunectl.training.network import Array

ACCURACY = frozenset({"accuracy", "acc"})
_ACCURACIES = ACCURACY | {"sparse_categorical_accuracy", "categorical_accuracy"}
"""What files call it; which of them it is the targets decide."""
_TOP = re.compile(r"top-?_?(\d+)(?:-?_?accuracy)?")


_NUMBER_BY_NUMBER = frozenset({"mae", "mse", "mape", "msle", "rmse", "logcosh", "r2_score"})
"""What compares number with number, beside all that end with `_error`: Keras may stretch targets that are fewer."""


def default(library: Library, loss: Loss | None, answer: Answer, y: Array | None) -> list[Any]:
    """Return what is looked at if nobody says."""
    if loss is None:
        return []
    if loss.kind.is_classification:
        return [accuracy(library, loss)]
    if not _is_as_wide(answer, y):
        is_label = y is not None and y.dtype.kind in "iub" and (answer.width or 0) > 1
        return [library.keras.metrics.SparseCategoricalAccuracy(name="accuracy")] if is_label else []
    return [] if loss.name == "mean_absolute_error" else [library.keras.metrics.MeanAbsoluteError(name="mae")]


def check_shape(name: str, answer: Answer, y: Array | None) -> None:
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


def wanted(library: Library, name: str, loss: Loss | None, objects: Mapping[str, Any]) -> Any:
    """Return the metric that a user asks for, by a name that Keras knows or the custom objects."""
    word = name.strip()
    if ":" in word:
        found = custom.function(word, "--metric")
        return found() if isinstance(found, type) else _by_example(library, found)
    if word.lower() in ACCURACY:
        return accuracy(library, loss)
    if top := _TOP.fullmatch(word.lower()):
        return _top(library, int(top[1]), loss)
    classes = {one.__name__.lower(): one for one in _classes(library)}
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
    """Return a function whose one number for a batch counts for each example of it: the last batch may be smaller."""
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
    """Return the accuracy that fits the targets of a loss."""
    metrics = library.keras.metrics
    if loss is None or loss.kind is Kind.OTHER:
        return "accuracy"  # Keras decides by the shapes that it sees
    if loss.kind is Kind.BINARY:
        return metrics.BinaryAccuracy(name="accuracy", threshold=0.0 if loss.is_of_logits else 0.5)
    if loss.kind is Kind.SPARSE:
        return metrics.SparseCategoricalAccuracy(name="accuracy")
    return metrics.CategoricalAccuracy(name="accuracy")


def of_file(library: Library, entry: Any, objects: Mapping[str, Any]) -> Any:
    """Return what a file calls a metric; an error of Keras if that is unknown here."""
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
    is_sparse = loss is not None and loss.kind is Kind.SPARSE
    kind = "SparseTopKCategoricalAccuracy" if is_sparse else "TopKCategoricalAccuracy"
    return getattr(library.keras.metrics, kind)(k=count, name=f"top{count}")


def _classes(library: Library) -> list[type]:
    metrics = library.keras.metrics
    found = [getattr(metrics, name) for name in dir(metrics) if not name.startswith("_")]
    return [one for one in found if isinstance(one, type) and issubclass(one, metrics.Metric)]
