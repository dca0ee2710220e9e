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
from prunectl.training.data.source import Arrays, Batch, Indices, Mask, as_tuple, map_arrays


def num_examples(batch: Batch) -> int:
    """How many examples a batch holds."""
    return len(as_tuple(batch.x)[0])


def nbytes(batch: Batch) -> int:
    """How many bytes a batch takes in memory."""
    targets = () if batch.y is None else as_tuple(batch.y)
    return sum(array.nbytes for array in (*as_tuple(batch.x), *targets))


def take_rows(batch: Batch, rows: slice | Indices | Mask) -> Batch:
    """Some examples of a batch."""
    y = None if batch.y is None else map_arrays(lambda array: array[rows], batch.y)
    return Batch(map_arrays(lambda array: array[rows], batch.x), y)


def concatenate(batches: Sequence[Batch]) -> Batch:
    """All examples of several batches as one."""
    if len(batches) == 1:
        return batches[0]
    targets = [batch.y for batch in batches if batch.y is not None]
    if targets and len(targets) < len(batches):
        raise InputError("some batches of the data have targets, and others have none")
    return Batch(_joined([batch.x for batch in batches]), _joined(targets) if targets else None)


def rebatch(batches: Iterable[Batch], batch_size: int) -> Iterator[Batch]:
    """Yield the same examples in batches of one size; the last may be smaller."""
    pending: list[Batch] = []
    count = 0
    for batch in batches:
        pending.append(batch)
        count += num_examples(batch)
        if count < batch_size:
            continue
        joined = concatenate(pending)
        for begin in range(0, count - batch_size + 1, batch_size):
            yield joined if count == batch_size else take_rows(joined, slice(begin, begin + batch_size))
        rest = count % batch_size
        pending, count = ([take_rows(joined, slice(count - rest, None))] if rest else []), rest
    if pending:
        yield concatenate(pending)


def shard_examples(batches: Iterable[Batch], rank: int, ranks: int) -> Iterator[Batch]:
    """Yield every ``ranks``-th example, as long as there is one for each rank."""
    if ranks == 1:
        yield from batches
        return
    for batch in rebatch(batches, ranks * max(1, 1024 // ranks)):
        usable = num_examples(batch) // ranks * ranks
        if usable:
            yield take_rows(batch, slice(rank, usable, ranks))


def take_first(batches: Iterable[Batch], count: int) -> Iterator[Batch]:
    """Yield the first examples."""
    left = count
    for batch in batches:
        available = min(left, num_examples(batch))
        if available:
            yield take_rows(batch, slice(0, available))
        left -= available
        if not left:
            return


def skip_batches(batches: Iterable[Batch], count: int) -> Iterator[Batch]:
    """Yield all but the first batches."""
    return islice(batches, count, None)


def _joined(parts: Sequence[Arrays]) -> Arrays:
    if isinstance(parts[0], tuple):
        return tuple(_one(column) for column in zip(*map(as_tuple, parts), strict=True))
    return _one([as_tuple(part)[0] for part in parts])


def _one(arrays: Sequence[Array]) -> Array:
    shapes = {array.shape[1:] for array in arrays}
    if len(shapes) > 1:
        titles = " and ".join(str(shape) for shape in sorted(shapes))
        raise InputError(
            f"the examples of the data differ in shape: {titles}",
            hint="pad or resize them to one shape; batches of differing shape pass only in their own size, unshuffled",
        )
    return np.concatenate(arrays)


Item = TypeVar("Item")
Made = TypeVar("Made")
_DEPTH = 2
"""Batches that wait for each thread."""


def parallel_map(make: Callable[[Item], Made], items: Iterable[Item], threads: int) -> Iterator[Made]:
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


def prefetch(items: Iterator[Made], threads: int) -> Iterator[Made]:
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
            item = waiting.popleft().result()
            if item is end:
                return
            yield item  # type: ignore[misc]
