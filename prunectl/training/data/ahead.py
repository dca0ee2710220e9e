"""Batches that are read and decoded by threads while the model trains on those before."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import TypeVar

from prunectl.formats.workers import workers

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
