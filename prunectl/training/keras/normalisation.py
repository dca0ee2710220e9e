"""The statistics of batch normalisation, taken anew over some batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from prunectl.training.data.source import Batch, each
from prunectl.training.keras import numbers, packing
from prunectl.training.keras.library import Library, quietly
from prunectl.training.network import Array


def layers(library: Library, model: Any) -> list[Any]:
    """Return the layers that normalise by batches, but for those that are frozen."""
    kind = library.keras.layers.BatchNormalization
    found = {id(layer): layer for layer in model._flatten_layers() if isinstance(layer, kind)}  # noqa: SLF001
    return [layer for layer in found.values() if layer.trainable]


def recalibrate(library: Library, model: Any, found: list[Any], batches: Iterable[Batch]) -> None:
    """Replace mean and variance of each layer by the averages over batches, weighted by their examples."""
    statistics = [variable for layer in found for variable in (layer.moving_mean, layer.moving_variance)]
    others = [one for one in _variables(library, model) if not any(one is other for other in statistics)]
    before = [numbers.read(library, one) for one in others]
    old = [numbers.read(library, one) for one in statistics]
    momenta = [layer.momentum for layer in found]
    sums: list[Array] = [np.zeros(one.shape, np.float64) for one in old]
    examples = 0
    try:
        for layer in found:
            layer.momentum = 0.0
        run = _runner(library, model)
        for batch in batches:
            for variable, value in zip(statistics, old, strict=True):
                # From zero, what is added to it comes out unrounded.
                numbers.write(library, variable, np.zeros_like(value))
            count = len(each(batch.x)[0])
            with quietly():
                run(packing.inputs(model, batch.x))
            for at, variable in enumerate(statistics):
                sums[at] += count * numbers.read(library, variable).astype(np.float64)
            examples += count
    finally:
        for layer, momentum in zip(found, momenta, strict=True):
            layer.momentum = momentum
        for variable, value in zip(others, before, strict=True):
            numbers.write(library, variable, value)
        new = [total / examples for total in sums] if examples else old
        for variable, value, known in zip(statistics, new, old, strict=True):
            numbers.write(library, variable, value.astype(known.dtype))


def _variables(library: Library, model: Any) -> list[Any]:
    return list(model.weights) if library.is_two else [one for one in model.variables if _is_number(one)]


def _is_number(variable: Any) -> bool:
    return "string" not in str(variable.dtype)


def _runner(library: Library, model: Any) -> Any:
    def run(x: Any) -> Any:
        return model(x, training=True)

    if library.is_on_tensorflow:
        # The layers' momentum is what it is while this is traced.
        return library.tensorflow.function(run, reduce_retracing=True)
    if library.backend == "torch":

        def without_gradients(x: Any) -> Any:
            with library.torch.no_grad():
                return run(x)

        return without_gradients
    return run
