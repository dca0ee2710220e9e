"""Small sources whose every example says its own number."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunectl.training.backend import ModelSignature, TensorSpec
from prunectl.training.data.readers import IterableSource, from_arrays
from prunectl.training.data.registry import open_source
from prunectl.training.data.source import Batch, EpochOrder, Source, as_tuple

Array = NDArray[Any]


def numbered(count: int) -> Source:
    """Arrays: example 7 is 7, its target -7."""
    numbers = np.arange(count)
    return from_arrays("numbered", {"x": numbers}, {"y": -numbers})


def streamed(count: int, piece: int, known: bool = True) -> Source:
    """The same, in pieces of a size."""

    def read() -> Iterator[Batch]:
        for begin in range(0, count, piece):
            numbers = np.arange(begin, min(count, begin + piece))
            yield Batch(numbers, -numbers)

    return IterableSource("streamed", count if known else None, True, read)


def numbers(source: Source, order: EpochOrder | None = None) -> list[int]:
    """Which examples come, in which order; each must have kept its own target."""
    found: list[int] = []
    for batch in source.batches(order or EpochOrder(7)):
        assert batch.y is not None
        assert np.array_equal(as_tuple(batch.x)[0], -as_tuple(batch.y)[0])
        found += as_tuple(batch.x)[0].tolist()
    return found


def whole(source: Source) -> tuple[Array, Array]:
    """All inputs and targets, each one array."""
    batches = list(source.batches(EpochOrder(5)))
    return np.concatenate([as_tuple(b.x)[0] for b in batches]), np.concatenate(
        [as_tuple(b.y)[0] for b in batches if b.y is not None]
    )


def opened(spec: str | Path, signature: ModelSignature | None = None) -> Source:
    return open_source(str(spec), signature=signature, seed=0)


def model(*shape: int | None, dtype: str = "float32", classes: int | None = 10, first: bool = False) -> ModelSignature:
    """What a classifier of one input says of itself."""
    return ModelSignature((TensorSpec("image", shape, dtype),), (TensorSpec("logits", (classes,), "float32"),), first)
