"""What a run would change about a model although it does not train it, put back afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from prunectl.training.keras import numbers
from prunectl.training.keras.chance import Chance
from prunectl.training.keras.library import Library
from prunectl.training.keras.sights.meeting import tree


@contextmanager
def untouched(library: Library, model: Any, chance: Chance) -> Iterator[None]:
    """Leave statistics, metrics, the states of recurrent layers and what is random as they were."""
    random = chance.states()
    held = [(one, numbers.read(library, one)) for one in (*_statistics(library, model), *_counts(model))]
    known = {id(one) for one, _ in held}
    try:
        yield
    finally:
        for one, value in held:
            numbers.write(library, one, value)
        for one in _counts(model):
            if id(one) not in known:
                # It was made by the run itself, and counted already.
                numbers.write(library, one, np.zeros(numbers.shape(one), numbers.dtype(one)))
        chance.resume(random)


def _statistics(library: Library, model: Any) -> list[Any]:
    # Those that a layer made as such: what a user froze is not among them, and may be large.
    kept = "_non_trainable_weights" if library.is_two else "_non_trainable_variables"
    found: dict[int, Any] = {}
    for layer in model._flatten_layers():  # noqa: SLF001
        states = layer.states if getattr(layer, "stateful", False) and hasattr(layer, "states") else None
        for one in (*getattr(layer, kept, ()), *tree(library).flatten(states)):
            if hasattr(one, "assign") and "string" not in str(one.dtype):
                found[id(one)] = one
    return list(found.values())


def _counts(model: Any) -> list[Any]:
    return [variable for metric in model.metrics for variable in metric.variables]
