"""The interface of data sources, the order of an epoch, and functions that split and join batches."""

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
    """A batch of examples, which are along the first axis of each array."""

    x: Arrays
    y: Arrays | None = None


@dataclass(frozen=True, slots=True)
class EpochOrder:
    """The order of the examples in an epoch, and the share of this process."""

    batch_size: int
    """The batch size of each process."""
    seed: int = 0
    epoch: int = 0
    is_shuffled: bool = False
    skip: int = 0
    """The number of batches that an interrupted run has already done."""
    rank: int = 0
    ranks: int = 1
    workers: int = 0
    """Number of threads that read batches ahead."""

    @property
    def random(self) -> np.random.Generator:
        """The generator that shuffles this epoch, the same in every process."""
        return np.random.default_rng((self.seed, self.epoch))


class Source(Protocol):
    """Examples that can be read repeatedly: the same order yields the same batches."""

    @property
    def name(self) -> str:
        """The name of the data, as typed."""

    @property
    def count(self) -> int | None:
        """Number of examples, if it is known without reading all of them."""

    @property
    def has_targets(self) -> bool:
        """Whether the examples have targets."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user on how the data was opened."""

    @property
    def target_name(self) -> str:
        """The name of the targets in the data, if they are a single array with a name."""

    def batches(self, order: EpochOrder) -> Iterator[Batch]:
        """Yield the batches of one epoch; the last may be smaller."""

    def labels(self) -> Iterator[Arrays]:
        """Yield all targets in order, if they can be read without inputs; otherwise nothing."""

    def map_batches(self, change: Callable[[Batch], Batch], *notes: str) -> Source:
        """The source with a function applied to its batches, which must treat each example separately."""

    def select(self, is_kept: Callable[[Indices], Mask]) -> Source:
        """The source of those examples whose indices are kept."""

    def where(self, holds: Callable[[Arrays], Mask]) -> Source:
        """The source of those examples whose targets satisfy a predicate."""

    def first(self, count: int) -> Source:
        """The source of at most the first `count` examples."""


def as_tuple(arrays: Arrays) -> tuple[Array, ...]:
    """The arrays as a tuple, even if there is only one."""
    return arrays if isinstance(arrays, tuple) else (arrays,)


def map_arrays(change: Callable[[Array], Any], arrays: Arrays) -> Arrays:
    """Apply a function to each array; a single array stays a single array."""
    return tuple(change(array) for array in arrays) if isinstance(arrays, tuple) else change(arrays)


def peek(source: Source, examples: int = 32) -> Batch | None:
    """The first examples; None if there are none."""
    return next(source.batches(EpochOrder(examples)), None)


def train_val_split(source: Source, share: float, seed: int) -> tuple[Source, Source]:
    """Split a source into disjoint training and validation data, of which `share` is the part for validation.

    Of n examples, round(share * n) are for validation; if n is unknown, a hash of its index decides for each example.
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"share must be in (0, 1), not {share}")
    if source.count is None:
        return (
            source.select(lambda numbers: ~_is_in_share(numbers, share, seed)),
            source.select(lambda numbers: _is_in_share(numbers, share, seed)),
        )
    size = round(share * source.count)
    if not 0 < size < source.count:
        raise InputError(
            f"{source.name} has {source.count} examples: a split of {share:.0%} leaves none "
            f"{'for validation' if size == 0 else 'for training'}"
        )
    is_validation = np.zeros(source.count, np.bool_)
    is_validation[np.random.default_rng((seed, source.count)).permutation(source.count)[:size]] = True
    return (
        source.select(lambda numbers: ~is_validation[numbers]),
        source.select(lambda numbers: is_validation[numbers]),
    )


def _is_in_share(numbers: Indices, share: float, seed: int) -> Mask:
    return _hash(numbers.astype(np.uint64) ^ _hash(np.uint64(seed))) < np.uint64(share * 2.0**64)


def _hash(numbers: NDArray[np.uint64] | np.uint64) -> NDArray[np.uint64]:
    """Hash numbers with the finaliser of SplitMix64, so that each output bit depends on all input bits."""
    z = np.atleast_1d(np.asarray(numbers, np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def num_examples(batch: Batch) -> int:
    """The number of examples in a batch."""
    return len(as_tuple(batch.x)[0])


def nbytes(batch: Batch) -> int:
    """The size of a batch in bytes."""
    targets = () if batch.y is None else as_tuple(batch.y)
    return sum(array.nbytes for array in (*as_tuple(batch.x), *targets))


def take_rows(batch: Batch, rows: slice | Indices | Mask) -> Batch:
    """Some examples of a batch."""
    y = None if batch.y is None else map_arrays(lambda array: array[rows], batch.y)
    return Batch(map_arrays(lambda array: array[rows], batch.x), y)


def fill_rows(array: Array, size: int) -> Array:
    """Pad an array to `size` rows with copies of its first row, for a file that fixes the batch size."""
    return array if len(array) == size else np.concatenate([array, np.repeat(array[:1], size - len(array), axis=0)])


def concatenate(batches: Sequence[Batch]) -> Batch:
    """Join several batches to one."""
    if len(batches) == 1:
        return batches[0]
    targets = [batch.y for batch in batches if batch.y is not None]
    if targets and len(targets) < len(batches):
        raise InputError(
            "only some batches of the data have targets", hint="return (x, y) for each of them, or x alone"
        )
    return Batch(_join([batch.x for batch in batches]), _join(targets) if targets else None)


def rebatch(batches: Iterable[Batch], batch_size: int) -> Iterator[Batch]:
    """Yield the same examples in batches of equal size; the last may be smaller."""
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
    """Yield every ``ranks``-th example; the last examples are dropped if there is not one for each rank."""
    if ranks == 1:
        yield from batches
        return
    for batch in rebatch(batches, ranks * max(1, 1024 // ranks)):
        usable = num_examples(batch) // ranks * ranks
        if usable:
            yield take_rows(batch, slice(rank, usable, ranks))


def take_first(batches: Iterable[Batch], count: int) -> Iterator[Batch]:
    """Yield the first examples."""
    remaining = count
    for batch in batches:
        available = min(remaining, num_examples(batch))
        if available:
            yield take_rows(batch, slice(0, available))
        remaining -= available
        if not remaining:
            return


def skip_batches(batches: Iterable[Batch], count: int) -> Iterator[Batch]:
    """Yield all but the first batches."""
    return islice(batches, count, None)


def _join(parts: Sequence[Arrays]) -> Arrays:
    if isinstance(parts[0], tuple):
        return tuple(_concatenate_arrays(column) for column in zip(*map(as_tuple, parts), strict=True))
    return _concatenate_arrays([as_tuple(part)[0] for part in parts])


def _concatenate_arrays(arrays: Sequence[Array]) -> Array:
    shapes = {array.shape[1:] for array in arrays}
    if len(shapes) > 1:
        titles = " and ".join(str(shape) for shape in sorted(shapes))
        raise InputError(
            f"the examples of the data have different shapes: {titles}",
            hint="pad or resize them to one shape",
        )
    return np.concatenate(arrays)


Item = TypeVar("Item")
Result = TypeVar("Result")
_DEPTH = 2
"""The number of batches that are prepared ahead, for each thread."""


def parallel_map(make: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """Yield the result for each item in order; threads compute some results ahead."""
    if not threads:
        yield from map(make, items)
        return
    futures: deque[Future[Result]] = deque()
    with workers(threads, "prunectl-data") as pool:
        for item in items:
            futures.append(pool.submit(make, item))
            if len(futures) > threads * _DEPTH:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()


def prefetch(items: Iterator[Result], threads: int) -> Iterator[Result]:
    """Yield the items of an iterator; a thread reads the next ones ahead."""
    if not threads:
        yield from items
        return
    end = object()
    futures: deque[Future[Result | object]] = deque()
    # Always one thread: an iterator cannot be read from two threads at once.
    with workers(1, "prunectl-data") as pool:
        while True:
            while len(futures) < _DEPTH:
                futures.append(pool.submit(next, items, end))
            item = futures.popleft().result()
            if item is end:
                return
            yield item  # type: ignore[misc]
