"""The first examples of some data as whole arrays, fitted to what a model takes."""

from __future__ import annotations

import numpy as np

from prunectl.calibrating.calibration import taken
from prunectl.formats.base import Array
from prunectl.training.data.adapt import adapt
from prunectl.training.data.check import check
from prunectl.training.data.source import Order, each
from prunectl.training.data.spec import open_source
from prunectl.training.signature import Signature


def first_inputs(
    spec: str, signature: Signature, count: int, order: Order
) -> tuple[tuple[Array, ...], tuple[str, ...]]:
    """Return the inputs of so many examples, and what is to be said of them; a stream is never shuffled."""
    source, notes = adapt(open_source(spec, signature=signature, seed=order.seed), signature)
    notes += check(source.first(count), signature, needs_targets=False, classes=None)
    own = Order(order.batch_size, order.seed, is_shuffled=order.is_shuffled and source.count is not None)
    parts = [each(batch.x) for batch in taken(source.batches(own), count)]
    whole = tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return whole, tuple(dict.fromkeys(notes))


def rows_of_batches(count: int, size: int) -> Array:
    """Return which examples each batch holds; the last is filled up with the first ones, again and again."""
    found: Array = np.arange(-(-count // size) * size).reshape(-1, size) % count
    return found
