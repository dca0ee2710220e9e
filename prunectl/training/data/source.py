"""Where examples come from, in which order, and their batches taken apart and put together."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from prunectl.errors import InputError
from prunectl.formats.base import Array
from prunectl.formats.workers import workers

Arrays = Array | tuple[Array, ...]
"""One array, or several in the order of the model's inputs."""
Indices = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Batch:
    """Some examples; the first axis of each array counts them."""

    x: Arrays
    y: Arrays | None = None


@dataclass(frozen=True, slots=True)
class EpochOrder:
    """Which examples come when, for one process of perhaps several."""

    batch_size: int
    """Of each process."""
    seed: int = 0
    epoch: int = 0
    is_shuffled: bool = False
    skip: int = 0
    """Batches that an interrupted run has already done."""
    rank: int = 0
    ranks: int = 1
    workers: int = 0
    """Threads that read ahead."""

    @property
    def random(self) -> np.random.Generator:
        """The numbers that shuffle this epoch, the same in every process."""
        return np.random.default_rng((self.seed, self.epoch))


class Source(Protocol):
    """Examples that can be gone through again and again: the same order gives the same batches."""

    @property
    def name(self) -> str:
        """What the user calls it."""

    @property
    def count(self) -> int | None:
        """Number of examples, if it is known without reading all of them."""

    @property
    def has_targets(self) -> bool:
        """Whether each example says what the model should answer."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What was decided when it was opened, in sentences."""

    @property
    def target_name(self) -> str:
        """What the data calls its targets, where there is one array of them, and it has a name."""

    def batches(self, order: EpochOrder) -> Iterator[Batch]:
        """Yield the batches of one epoch; the last may be smaller."""

    def labels(self) -> Iterator[Arrays]:
        """Yield all targets in order, where this needs no inputs; else nothing."""

    def changed(self, change: Callable[[Batch], Batch], *notes: str) -> Source:
        """The source whose batches are changed, example by example."""

    def numbered(self, is_kept: Callable[[Indices], Mask]) -> Source:
        """The examples whose numbers are kept."""

    def where(self, holds: Callable[[Arrays], Mask]) -> Source:
        """The examples with targets for which something holds."""

    def first(self, count: int) -> Source:
        """At most that many examples from the beginning."""


def as_tuple(arrays: Arrays) -> tuple[Array, ...]:
    """The arrays one by one, also if there is only one."""
    return arrays if isinstance(arrays, tuple) else (arrays,)


def map_arrays(change: Callable[[Array], Any], arrays: Arrays) -> Arrays:
    """The arrays, each changed, alone if there was only one."""
    return tuple(change(array) for array in arrays) if isinstance(arrays, tuple) else change(arrays)


def peek(source: Source, examples: int = 32) -> Batch | None:
    """The first examples; None if there are none."""
    return next(source.batches(EpochOrder(examples)), None)


def train_val_split(source: Source, share: float, seed: int) -> tuple[Source, Source]:
    """The rest and the share of a source, which have no example in common.

    Of n examples the share gets round(share * n); where n is unknown, each goes where a hash of its number says.
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"share must be in (0, 1), not {share}")
    if source.count is None:
        return (
            source.numbered(lambda numbers: ~_falls_in(numbers, share, seed)),
            source.numbered(lambda numbers: _falls_in(numbers, share, seed)),
        )
    size = round(share * source.count)
    if not 0 < size < source.count:
        raise InputError(
            f"{source.name} has {source.count} examples: a split of {share:.0%} leaves none "
            f"{'for validation' if size == 0 else 'for training'}"
        )
    is_shared = np.zeros(source.count, np.bool_)
    is_shared[np.random.default_rng((seed, source.count)).permutation(source.count)[:size]] = True
    return (
        source.numbered(lambda numbers: ~is_shared[numbers]),
        source.numbered(lambda numbers: is_shared[numbers]),
    )


def _falls_in(numbers: Indices, share: float, seed: int) -> Mask:
    return _mixed(numbers.astype(np.uint64) ^ _mixed(np.uint64(seed))) < np.uint64(share * 2.0**64)


def _mixed(numbers: NDArray[np.uint64] | np.uint64) -> NDArray[np.uint64]:
    """Numbers of which every bit depends on every bit (the finaliser of SplitMix64)."""
    z = np.atleast_1d(np.asarray(numbers, np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


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


def fill_rows(array: Array, size: int) -> Array:
    """An array with so many rows: behind its own stands the first again, for a file that fixes their number."""
    return array if len(array) == size else np.concatenate([array, np.repeat(array[:1], size - len(array), axis=0)])


def concatenate(batches: Sequence[Batch]) -> Batch:
    """All examples of several batches as one."""
    if len(batches) == 1:
        return batches[0]
    targets = [batch.y for batch in batches if batch.y is not None]
    if targets and len(targets) < len(batches):
        raise InputError(
            "only some batches of the data have targets", hint="return (x, y) for each of them, or x alone"
        )
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
            f"the examples of the data have different shapes: {titles}",
            hint="pad or resize them to one shape",
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
