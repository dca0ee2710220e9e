"""Tensors that stay as they are, to the bit, while the rest is trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from prunectl.training.keras import numbers
from prunectl.training.keras.library import Library
from prunectl.training.network import Array


def freeze(library: Library, model: Any, variables: Sequence[Any]) -> list[tuple[Any, Array]]:
    """Keep variables out of training, and return what has to be put back after a step, with its numbers."""
    if not variables:
        return []
    frozen = {id(one) for one in variables}
    for layer in model._flatten_layers(include_self=False):  # noqa: SLF001
        held = layer.weights
        if held and all(id(one) in frozen for one in held):
            # All of it: batch normalisation then uses the statistics that it has.
            layer.trainable = False
    if not library.is_two:
        for one in variables:
            one.trainable = False
    moved = {id(one) for one in model.trainable_weights}
    still = {id(one) for layer in _still(model) for one in layer.weights}
    loose = [one for one in variables if id(one) not in moved and id(one) not in still]
    return [(one, numbers.read(library, one)) for one in loose]


def put_back(library: Library, held: Iterable[tuple[Any, Array]]) -> None:
    """Undo what a step has done to statistics that are frozen while their layer is not."""
    for variable, value in held:
        numbers.write(library, variable, value)


def _still(model: Any) -> list[Any]:
    return [layer for layer in model._flatten_layers(include_self=False) if not layer.trainable]  # noqa: SLF001
