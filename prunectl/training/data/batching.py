"""Batches taken apart and put together."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from itertools import islice
from typing import TypeVar

import numpy as np

from prunectl.errors import InputError
from prunectl.formats.base import Array
from prunectl.formats.workers import workers
from prunectl.training.data.source import Arrays, Batch, Indices, Mask, each, mapped


def length(batch: Batch) -> int:
    """Return how many examples a batch holds."""
    return len(each(batch.x)[0])


def nbytes(batch: Batch) -> int:
    """Return how many bytes a batch takes in memory."""
    targets = () if batch.y is None else each(batch.y)
    return sum(array.nbytes for array in (*each(batch.x), *targets))


def taken(batch: Batch, rows: slice | Indices | Mask) -> Batch:
    """Return some examples of a batch."""
    y = None if batch.y is None else mapped(lambda array: array[rows], batch.y)
    return Batch(mapped(lambda array: array[rows], batch.x), y)


def joined(batches: Sequence[Batch]) -> Batch:
    """Return all examples of several batches as one."""
    if len(batches) == 1:
        return batches[0]
    targets = [batch.y for batch in batches if batch.y is not None]
    if targets and len(targets) < len(batches):
        raise InputError("some batches of the data have targets, and others have none")
    return Batch(_joined([batch.x for batch in batches]), _joined(targets) if targets else None)


def rebatched(batches: Iterable[Batch], batch_size: int) -> Iterator[Batch]:
    """Yield the same examples in batches of one size; the last may be smaller."""
    held: list[Batch] = []
    count = 0
    for batch in batches:
        held.append(batch)
        count += length(batch)
        if count < batch_size:
            continue
        whole = joined(held)
        for begin in range(0, count - batch_size + 1, batch_size):
            yield whole if count == batch_size else taken(whole, slice(begin, begin + batch_size))
        rest = count % batch_size
        held, count = ([taken(whole, slice(count - rest, None))] if rest else []), rest
    if held:
        yield joined(held)


def shared_out(batches: Iterable[Batch], rank: int, ranks: int) -> Iterator[Batch]:
    """Yield every ``ranks``-th example, as long as there is one for each rank."""
    if ranks == 1:
        yield from batches
        return
    for batch in rebatched(batches, ranks * max(1, 1024 // ranks)):
        whole = length(batch) // ranks * ranks
        if whole:
            yield taken(batch, slice(rank, whole, ranks))


def beginning(batches: Iterable[Batch], count: int) -> Iterator[Batch]:
    """Yield the first examples."""
    left = count
    for batch in batches:
        found = min(left, length(batch))
        if found:
            yield taken(batch, slice(0, found))
        left -= found
        if not left:
            return


def skipped(batches: Iterable[Batch], count: int) -> Iterator[Batch]:
    """Yield all but the first batches."""
    return islice(batches, count, None)


def _joined(parts: Sequence[Arrays]) -> Arrays:
    if isinstance(parts[0], tuple):
        return tuple(_one(column) for column in zip(*map(each, parts), strict=True))
    return _one([each(part)[0] for part in parts])


def _one(arrays: Sequence[Array]) -> Array:
    shapes = {array.shape[1:] for array in arrays}
    if len(shapes) > 1:
        said = " and ".join(str(shape) for shape in sorted(shapes))
        raise InputError(
            f"the examples of the data differ in shape: {said}",
            hint="pad or resize them to one shape; batches of differing shape pass only in their own size, unshuffled",
        )
    return np.concatenate(arrays)


Item = TypeVar("Item")
Made = TypeVar("Made")
_DEPTH = 2
"""Batches that wait for each thread."""


def ahead(make: Callable[[Item], Made], items: Iterable[Item], threads: int) -> Iterator[Made]:
    """Yield what is made of each item, in their order, some of it made beforehand."""
    if not threads:
        yield from map(make, items)
        return
    waiting: deque[Future[Made]] = deque()
    with workers(threads, "prunectl-data") as pool:
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) > threads * _DEPTH:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def read_ahead(items: Iterator[Made], threads: int) -> Iterator[Made]:
    """Yield items that come one after the other, the next of them read by one thread beforehand."""
    if not threads:
        yield from items
        return
    end = object()
    waiting: deque[Future[Made | object]] = deque()
    # One thread, whatever is asked for: what comes in a row cannot be read in two places.
    with workers(1, "prunectl-data") as pool:
        while True:
            while len(waiting) < _DEPTH:
                waiting.append(pool.submit(next, items, end))
            found = waiting.popleft().result()
            if found is end:
                return
            yield found  # type: ignore[misc]
