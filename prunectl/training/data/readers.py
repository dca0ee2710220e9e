"""Sources with random access by index, and sources that can only be read as streams."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from prunectl.errors import InputError, UsageError
from prunectl.formats.base import Array
from prunectl.training.backend import TensorSpec
from prunectl.training.data.source import (
    Arrays,
    Batch,
    EpochOrder,
    Indices,
    Mask,
    concatenate,
    map_arrays,
    nbytes,
    num_examples,
    parallel_map,
    prefetch,
    rebatch,
    shard_examples,
    skip_batches,
    take_first,
    take_rows,
)

LABELS_AT_ONCE = 1 << 16
"""The number of labels that are read at once."""


@dataclass(frozen=True, slots=True)
class IndexedSource:
    """A source with random access to its examples by index."""

    name: str
    count: int
    has_targets: bool
    take: Callable[[Indices], Batch]
    """Returns the examples at given indices, in their order."""
    targets: Callable[[Indices], Arrays | None] | None = None
    """Returns only their targets, if that is cheaper."""
    notes: tuple[str, ...] = ()
    target_name: str = ""
    """The name of the target array, if it has one."""

    def batches(self, order: EpochOrder) -> Iterator[Batch]:
        """Yield the batches of one epoch."""
        indices = order.random.permutation(self.count) if order.is_shuffled else np.arange(self.count)
        usable = self.count // order.ranks * order.ranks
        mine = indices[order.rank : usable : order.ranks] if order.ranks > 1 else indices
        begins = range(order.skip * order.batch_size, len(mine), order.batch_size)
        return parallel_map(lambda begin: self.take(mine[begin : begin + order.batch_size]), begins, order.workers)

    def labels(self) -> Iterator[Arrays]:
        """Yield all targets in order, if they can be read without inputs."""
        if self.targets is None or not self.has_targets:
            return
        for begin in range(0, self.count, LABELS_AT_ONCE):
            targets = self.targets(np.arange(begin, min(self.count, begin + LABELS_AT_ONCE)))
            if targets is not None:
                yield targets

    def map_batches(self, change: Callable[[Batch], Batch], *notes: str) -> IndexedSource:
        """The source with a function applied to its batches."""
        take, targets = self.take, self.targets
        nothing = np.zeros(0, np.int64)

        def changed_targets(numbers: Indices) -> Arrays | None:
            # `change` takes whole batches, so the targets get an empty batch of inputs.
            return None if targets is None else change(replace(take(nothing), y=targets(numbers))).y

        return replace(
            self,
            take=lambda numbers: change(take(numbers)),
            targets=None if targets is None else changed_targets,
            notes=(*self.notes, *notes),
        )

    def select(self, is_kept: Callable[[Indices], Mask]) -> IndexedSource:
        """The source of those examples whose indices are kept."""
        return self._subset(np.flatnonzero(is_kept(np.arange(self.count))))

    def where(self, holds: Callable[[Arrays], Mask]) -> IndexedSource:
        """The source of those examples whose targets satisfy a predicate."""
        labels = self.labels() if self.targets is not None else self._labels_with_inputs()
        masks = [holds(label) for label in labels]
        return self._subset(np.flatnonzero(np.concatenate(masks)) if masks else np.zeros(0, np.int64))

    def first(self, count: int) -> IndexedSource:
        """The source of at most the first `count` examples."""
        return replace(self, count=min(count, self.count))

    def _labels_with_inputs(self) -> Iterator[Arrays]:
        for batch in self.batches(EpochOrder(256)):
            if batch.y is not None:
                yield batch.y

    def _subset(self, numbers: Indices) -> IndexedSource:
        take, targets = self.take, self.targets
        return replace(
            self,
            count=len(numbers),
            take=lambda chosen: take(numbers[chosen]),
            targets=None if targets is None else lambda chosen: targets(numbers[chosen]),
        )


SHUFFLED_EXAMPLES = 10_000
SHUFFLED_BYTES = 64 << 20
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class IterableSource:
    """A source that is read from the beginning for every epoch."""

    name: str
    count: int | None
    has_targets: bool
    read: Callable[[], Iterator[Batch]]
    """Yields all examples, in batches of any size."""
    notes: tuple[str, ...] = ()
    target_name: str = ""
    """The name of the target array, if it has one."""

    def batches(self, order: EpochOrder) -> Iterator[Batch]:
        """Yield the batches of one epoch."""
        pieces = shuffle_buffer(self.read(), order.random) if order.is_shuffled else self.read()
        mine = shard_examples(pieces, order.rank, order.ranks)
        return prefetch(skip_batches(rebatch(mine, order.batch_size), order.skip), order.workers)

    def labels(self) -> Iterator[Arrays]:
        """Yield nothing: targets come only with their inputs."""
        return iter(())

    def map_batches(self, change: Callable[[Batch], Batch], *notes: str) -> IterableSource:
        """The source with a function applied to its batches."""
        read = self.read
        return replace(self, read=lambda: map(change, read()), notes=(*self.notes, *notes))

    def select(self, is_kept: Callable[[Indices], Mask]) -> IterableSource:
        """The source of those examples whose indices are kept."""
        read = self.read

        def chosen() -> Iterator[Batch]:
            begin = 0
            for piece in read():
                end = begin + num_examples(piece)
                yield take_rows(piece, is_kept(np.arange(begin, end)))
                begin = end

        known = None if self.count is None else int(is_kept(np.arange(self.count)).sum())
        return replace(self, count=known, read=lambda: filter(num_examples, chosen()))

    def where(self, holds: Callable[[Arrays], Mask]) -> IterableSource:
        """The source of those examples whose targets satisfy a predicate."""
        read = self.read

        def chosen() -> Iterator[Batch]:
            for piece in read():
                if piece.y is not None:
                    yield take_rows(piece, holds(piece.y))

        return replace(self, count=None, read=lambda: filter(num_examples, chosen()))

    def first(self, count: int) -> IterableSource:
        """The source of at most the first `count` examples."""
        read = self.read
        known = None if self.count is None else min(count, self.count)
        return replace(self, count=known, read=lambda: take_first(read(), count))


def shuffle_buffer(pieces: Iterable[Batch], random: np.random.Generator) -> Iterator[Batch]:
    """Yield examples shuffled within a buffer of the next thousands."""
    pool: list[Batch] = []
    count = held_bytes = 0
    for piece in pieces:
        pool.append(piece)
        count += num_examples(piece)
        held_bytes += nbytes(piece)
        if count > 1 and (count >= SHUFFLED_EXAMPLES or held_bytes >= SHUFFLED_BYTES):
            buffer = concatenate(pool)
            order = random.permutation(count)
            # Half of the buffer stays, to be mixed with the next examples.
            yield take_rows(buffer, order[count // 2 :])
            rest = take_rows(buffer, order[: count // 2])
            pool, count, held_bytes = [rest], count // 2, nbytes(rest)
    if pool:
        yield take_rows(concatenate(pool), random.permutation(count))


def chunked(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield items in lists of one size; the last may be smaller."""
    chunk: list[Item] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


NUMERIC = "fiub"
"""The NumPy dtype kinds that a model accepts: floats, signed and unsigned integers, and booleans."""


TARGETS = ("labels", "label", "targets", "target", "y")
"""Usual names of target arrays, beside inputs that have the names of the model's."""


def from_arrays(name: str, x: Mapping[str, Array], y: Mapping[str, Array], *notes: str) -> IndexedSource:
    """A source of named arrays, whose first axes count the examples."""
    named = {**x, **y}
    for title, array in named.items():
        if array.ndim == 0:
            raise InputError(f"{name}: {title} is a single number, not an array of examples")
    lengths = {title: len(array) for title, array in named.items()}
    if len(set(lengths.values())) > 1:
        lengths_text = ", ".join(f"{title} has {length}" for title, length in lengths.items())
        raise InputError(f"{name}: the arrays have different numbers of examples: {lengths_text}")
    inputs, targets = _unwrap(x), _unwrap(y) if y else None

    def select(arrays: Arrays, numbers: Indices) -> Arrays:
        return map_arrays(lambda array: np.asarray(array[_as_slice(numbers)]), arrays)

    def take(numbers: Indices) -> Batch:
        return Batch(select(inputs, numbers), None if targets is None else select(targets, numbers))

    return IndexedSource(
        name,
        next(iter(lengths.values())),
        targets is not None,
        take,
        None if targets is None else lambda numbers: select(targets, numbers),
        notes=notes,
        target_name=Path(next(iter(y))).stem if len(y) == 1 else "",
    )


def order_by_port(where: str, names: Sequence[str], ports: Sequence[TensorSpec]) -> tuple[list[int], tuple[str, ...]]:
    """The order of arrays by which they match the inputs or outputs of a model, with a note if it was changed by name.

    Inputs of a text model often have the same type and shape: in another order they would fit, and be wrong.
    """
    wanted = [port.name for port in ports]
    as_given = list(range(len(names)))
    if len(names) != len(wanted) or list(names) == wanted:
        return as_given, ()
    listed = ", ".join(wanted)
    if sorted(names) == sorted(wanted):
        order = [names.index(name) for name in wanted]
        return order, (f"{where}: arrays are matched with the model by their names, in its order: {listed}",)
    displaced = next((name for name, port in zip(names, wanted, strict=True) if name != port and name in wanted), None)
    if displaced is not None:
        raise UsageError(f"{where}: {displaced} is not in the model's position", hint=f"the model's order is {listed}")
    return as_given, ()


def _unwrap(arrays: Mapping[str, Array]) -> Arrays:
    values = tuple(arrays.values())
    return values[0] if len(values) == 1 else values


def _as_slice(numbers: Indices) -> slice | Indices:
    """Consecutive indices as a slice, which copies nothing."""
    if len(numbers) and numbers[-1] - numbers[0] == len(numbers) - 1 and (np.diff(numbers) == 1).all():
        return slice(int(numbers[0]), int(numbers[-1]) + 1)
    return numbers
