"""How well the whole model answers with one tensor pruned and all others as they are."""

from __future__ import annotations

import math

from prunectl.calibrating.sensitivity.found import SPARSITIES, Score
from prunectl.calibrating.sensitivity.weights import Levels, pruned
from prunectl.errors import WorkError
from prunectl.formats.base import Array
from prunectl.training.data import labels
from prunectl.training.data.source import Batch, each
from prunectl.training.network import Logs, Means, Network
from prunectl.training.signature import Signature

_ACCURACIES = ("accuracy", "acc", "sparse_categorical_accuracy", "categorical_accuracy", "binary_accuracy")


def prepare(network: Network, batches: tuple[Batch, ...], loss: str, seed: int, name: str) -> None:
    """Choose the loss, and refuse labels that the model does not know."""
    network.prepare(Means(loss=loss, optimizer="sgd", lr=0.0, seed=seed, example=batches[0]))
    begin = 0
    for batch in batches:
        if batch.y is not None and not isinstance(batch.y, tuple):
            classes = _classes(network.signature, batch.y)
            if classes is not None:
                output = network.signature.outputs[0].shape
                labels.check(batch.y, classes, output, what=f"y of {name} (shuffled)", begin=begin)
        begin += len(each(batch.x)[0])


def base_score(network: Network, batches: tuple[Batch, ...]) -> Score:
    """Return how well the model answers as it is."""
    found = _score(network.evaluate(iter(batches)))
    if found.loss is None:
        raise WorkError(
            "the loss of the model is no finite number before anything is pruned",
            hint="is the data scaled as in training (?norm=unit), and is it the right --loss?",
        )
    return found


def scores_of(
    network: Network, batches: tuple[Batch, ...], name: str, weights: Array, gone: Levels
) -> tuple[Score, ...]:
    """Return how well the model answers at each sparsity of one tensor, which is as it was afterwards."""
    found = []
    for level in range(len(SPARSITIES)):
        network.assign({name: pruned(weights, gone, level)})
        found.append(_score(network.evaluate(iter(batches))))
    network.assign({name: weights})
    return tuple(found)


def _score(logs: Logs) -> Score:
    loss = float(logs["loss"])
    accuracy = next((float(logs[name]) for name in _ACCURACIES if name in logs), None)
    return Score(loss if math.isfinite(loss) else None, accuracy)


def _classes(signature: Signature, y: Array) -> int | None:
    """Return how many classes labels may name; None where the targets are no labels."""
    shape = signature.outputs[0].shape if signature.outputs else None
    is_label = shape is not None and y.dtype.kind in "iu" and (y.ndim == len(shape) or y.shape[1:] == (1,))
    classes = shape[-1] if shape and is_label else None
    return classes if classes is not None and classes > 1 else None
