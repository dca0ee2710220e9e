"""Examples that can be taken in any order, by their numbers."""

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

LOOKED_AT_ONCE = 1 << 16
"""Labels in a chunk."""


@dataclass(frozen=True, slots=True)
class IndexedSource:
    """A source whose examples have numbers."""

    name: str
    count: int
    has_targets: bool
    take: Callable[[Indices], Batch]
    """The examples with these numbers, in that order."""
    targets: Callable[[Indices], Arrays | None] | None = None
    """Their targets alone, where this is cheap."""
    notes: tuple[str, ...] = ()
    target_name: str = ""
    """Of the targets."""

    def batches(self, order: EpochOrder) -> Iterator[Batch]:
        """Yield the batches of one epoch."""
        indices = order.random.permutation(self.count) if order.is_shuffled else np.arange(self.count)
        usable = self.count // order.ranks * order.ranks
        mine = indices[order.rank : usable : order.ranks] if order.ranks > 1 else indices
        begins = range(order.skip * order.batch_size, len(mine), order.batch_size)
        return parallel_map(lambda begin: self.take(mine[begin : begin + order.batch_size]), begins, order.workers)

    def labels(self) -> Iterator[Arrays]:
        """Yield all targets in order, where this is cheap."""
        if self.targets is None or not self.has_targets:
            return
        for begin in range(0, self.count, LOOKED_AT_ONCE):
            targets = self.targets(np.arange(begin, min(self.count, begin + LOOKED_AT_ONCE)))
            if targets is not None:
                yield targets

    def changed(self, change: Callable[[Batch], Batch], *notes: str) -> IndexedSource:
        """The source whose batches are changed."""
        take, targets = self.take, self.targets
        nothing = np.zeros(0, np.int64)

        def changed_targets(numbers: Indices) -> Arrays | None:
            # The inputs of no example, beside the targets: a change of either is one function of the batch.
            return None if targets is None else change(replace(take(nothing), y=targets(numbers))).y

        return replace(
            self,
            take=lambda numbers: change(take(numbers)),
            targets=None if targets is None else changed_targets,
            notes=(*self.notes, *notes),
        )

    def numbered(self, is_kept: Callable[[Indices], Mask]) -> IndexedSource:
        """The examples whose numbers are kept."""
        return self._among(np.flatnonzero(is_kept(np.arange(self.count))))

    def where(self, holds: Callable[[Arrays], Mask]) -> IndexedSource:
        """The examples with targets for which something holds."""
        labels = self.labels() if self.targets is not None else self._labels_with_inputs()
        masks = [holds(label) for label in labels]
        return self._among(np.flatnonzero(np.concatenate(masks)) if masks else np.zeros(0, np.int64))

    def first(self, count: int) -> IndexedSource:
        """At most that many examples from the beginning."""
        return replace(self, count=min(count, self.count))

    def _labels_with_inputs(self) -> Iterator[Arrays]:
        for batch in self.batches(EpochOrder(256)):
            if batch.y is not None:
                yield batch.y

    def _among(self, numbers: Indices) -> IndexedSource:
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
    """A source that is read from its beginning each time."""

    name: str
    count: int | None
    has_targets: bool
    read: Callable[[], Iterator[Batch]]
    """All examples, in pieces of any size."""
    notes: tuple[str, ...] = ()
    target_name: str = ""
    """Of the targets."""

    def batches(self, order: EpochOrder) -> Iterator[Batch]:
        """Yield the batches of one epoch."""
        pieces = shuffle_buffer(self.read(), order.random) if order.is_shuffled else self.read()
        mine = shard_examples(pieces, order.rank, order.ranks)
        return prefetch(skip_batches(rebatch(mine, order.batch_size), order.skip), order.workers)

    def labels(self) -> Iterator[Arrays]:
        """Yield nothing: targets come only with their inputs."""
        return iter(())

    def changed(self, change: Callable[[Batch], Batch], *notes: str) -> IterableSource:
        """The source whose batches are changed."""
        read = self.read
        return replace(self, read=lambda: map(change, read()), notes=(*self.notes, *notes))

    def numbered(self, is_kept: Callable[[Indices], Mask]) -> IterableSource:
        """The examples whose numbers are kept."""
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
        """The examples with targets for which something holds."""
        read = self.read

        def chosen() -> Iterator[Batch]:
            for piece in read():
                if piece.y is not None:
                    yield take_rows(piece, holds(piece.y))

        return replace(self, count=None, read=lambda: filter(num_examples, chosen()))

    def first(self, count: int) -> IterableSource:
        """At most that many examples from the beginning."""
        read = self.read
        known = None if self.count is None else min(count, self.count)
        return replace(self, count=known, read=lambda: take_first(read(), count))


def shuffle_buffer(pieces: Iterable[Batch], random: np.random.Generator) -> Iterator[Batch]:
    """Yield examples in an order that is random within a pool of the next thousands."""
    pool: list[Batch] = []
    count = held_bytes = 0
    for piece in pieces:
        pool.append(piece)
        count += num_examples(piece)
        held_bytes += nbytes(piece)
        if count > 1 and (count >= SHUFFLED_EXAMPLES or held_bytes >= SHUFFLED_BYTES):
            buffer = concatenate(pool)
            order = random.permutation(count)
            # Half of the pool stays, to mix with what comes next.
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
"""Kinds of numbers that a model can be fed: floats, integers, signed or not, and booleans."""


TARGETS = ("labels", "label", "targets", "target", "y")
"""What the array of targets is called, beside inputs that have the names of a model's."""


def from_arrays(name: str, x: Mapping[str, Array], y: Mapping[str, Array], *notes: str) -> IndexedSource:
    """The examples that arrays hold along their first axes, by the arrays' names."""
    named = {**x, **y}
    for title, array in named.items():
        if array.ndim == 0:
            raise InputError(f"{name}: {title} is a single number, not an array of examples")
    lengths = {title: len(array) for title, array in named.items()}
    if len(set(lengths.values())) > 1:
        lengths_text = ", ".join(f"{title} has {length}" for title, length in lengths.items())
        raise InputError(f"{name}: the arrays have different numbers of examples: {lengths_text}")
    inputs, targets = _together(x), _together(y) if y else None

    def of(arrays: Arrays, numbers: Indices) -> Arrays:
        return map_arrays(lambda array: np.asarray(array[_run(numbers)]), arrays)

    def take(numbers: Indices) -> Batch:
        return Batch(of(inputs, numbers), None if targets is None else of(targets, numbers))

    return IndexedSource(
        name,
        next(iter(lengths.values())),
        targets is not None,
        take,
        None if targets is None else lambda numbers: of(targets, numbers),
        notes=notes,
        target_name=Path(next(iter(y))).stem if len(y) == 1 else "",
    )


def order_by_port(where: str, names: Sequence[str], ports: Sequence[TensorSpec]) -> tuple[list[int], tuple[str, ...]]:
    """In which order arrays go to the inputs or outputs of a model, and a note where that is by their names.

    Inputs of a text model are often alike in type and shape: in another order they would fit, and be wrong.
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
        raise UsageError(
            f"{where}: {displaced} does not stand where the model has it", hint=f"the model's order is {listed}"
        )
    return as_given, ()


def _together(arrays: Mapping[str, Array]) -> Arrays:
    values = tuple(arrays.values())
    return values[0] if len(values) == 1 else values


def _run(numbers: Indices) -> slice | Indices:
    """Numbers that follow each other as a slice, which copies nothing."""
    if len(numbers) and numbers[-1] - numbers[0] == len(numbers) - 1 and (np.diff(numbers) == 1).all():
        return slice(int(numbers[0]), int(numbers[-1]) + 1)
    return numbers
