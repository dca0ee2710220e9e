"""How good are the answers of a model that only predicts? Added up batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches

import numpy as np

from prunectl.errors import InputError, UsageError
from prunectl.formats.base import Array
from prunectl.training.data.source import Arrays, Batch, each
from prunectl.training.judging.fitting import unfitting

_EVEN = 0.5
Score = Callable[[Array, Array], Array]
"""A number for each example, of outputs and targets."""


def scored(predict: Callable[[Arrays], Arrays], batches: Iterable[Batch], metric: str, name: str) -> tuple[str, float]:
    """Return a metric by its name, and its mean over the examples; of the first output, if there are several."""
    total, count, chosen = 0.0, 0, metric
    single: list[tuple[Array, Array]] = []
    for batch in batches:
        assert batch.y is not None
        found, targets = np.asarray(each(predict(batch.x))[0], np.float64), each(batch.y)[0]
        chosen = chosen or _usual(found, targets)
        score = _score(chosen)
        if score is _accuracy and found.size == len(found):
            if targets.size != found.size:
                raise unfitting(chosen, found.shape, targets.shape)
            single.append((found.reshape(-1), targets.reshape(-1)))
        else:
            total += float(_fitting(chosen, score, found, targets).sum())
        count += len(found)
    if not count:
        raise InputError(f"{name} has no examples")
    return chosen, (_of_two_classes(single) if single else total / count)


def _fitting(name: str, score: Score, found: Array, targets: Array) -> Array:
    """Return a score of outputs and targets that fit it, and each other."""
    try:
        return score(found, targets)
    except ValueError as error:
        raise unfitting(name, found.shape, targets.shape, str(error)) from error


def _of_two_classes(pieces: Sequence[tuple[Array, Array]]) -> float:
    """Return how often one output for two classes is on the right side: of zero, if it is ever no probability."""
    found, targets = (np.concatenate(part) for part in zip(*pieces, strict=True))
    is_logit = found.min() < 0 or found.max() > 1
    return float(np.mean((found > (0.0 if is_logit else _EVEN)) == (targets > _EVEN)))


def _usual(found: Array, targets: Array) -> str:
    """Return what is asked if nobody says: whether labels are right, how far numbers are off."""
    return "accuracy" if targets.dtype.kind in "biu" or _is_one_hot(found, targets) else "mae"


def _is_one_hot(found: Array, targets: Array) -> bool:
    return (
        targets.shape == found.shape
        and targets.ndim > 1
        and targets.shape[-1] > 1
        and bool(np.isin(targets, (0, 1)).all() and (targets.sum(axis=-1) == 1).all())
    )


def _accuracy(found: Array, targets: Array) -> Array:
    if targets.dtype.kind == "f" and targets.shape != found.shape and not (targets == targets.round()).all():
        raise ValueError("the targets are no labels")
    labels = targets.argmax(axis=-1) if targets.shape == found.shape else targets.reshape(found.shape[:-1])
    return _by_example(found.argmax(axis=-1) == labels)


def _absolute(found: Array, targets: Array) -> Array:
    return _by_example(np.abs(found - targets.reshape(found.shape)))


def _squared(found: Array, targets: Array) -> Array:
    return _by_example(np.square(found - targets.reshape(found.shape)))


def _by_example(values: Array) -> Array:
    return np.asarray(values.reshape(len(values), -1).mean(axis=1))


_SCORES: dict[str, Score] = {"accuracy": _accuracy, "mae": _absolute, "mse": _squared}


def _score(name: str) -> Score:
    if name not in _SCORES:
        raise UsageError(
            f"no metric of a model that only predicts is called {name}",
            did_you_mean=tuple(get_close_matches(name, _SCORES)),
            hint=f"known: {', '.join(_SCORES)}; a loss is known to files that can be trained",
        )
    return _SCORES[name]
