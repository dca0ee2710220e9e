"""Examples that can be taken in any order, by their numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from prunectl.training.data.ahead import ahead
from prunectl.training.data.source import Arrays, Batch, Indices, Mask, Order

LOOKED_AT_ONCE = 1 << 16
"""Labels in a chunk."""


@dataclass(frozen=True, slots=True)
class Rows:
    """A source whose examples have numbers."""

    name: str
    count: int
    has_targets: bool
    take: Callable[[Indices], Batch]
    """The examples with these numbers, in that order."""
    targets: Callable[[Indices], Arrays | None] | None = None
    """Their targets alone, where this is cheap."""
    is_random: bool = False
    notes: tuple[str, ...] = ()

    def batches(self, order: Order) -> Iterator[Batch]:
        """Yield the batches of one epoch."""
        mine = self._numbers(order)
        begins = range(order.skip * order.batch_size, len(mine), order.batch_size)
        return ahead(lambda begin: self.take(mine[begin : begin + order.batch_size]), begins, order.workers)

    def labels(self) -> Iterator[Arrays]:
        """Yield all targets in order, where this is cheap."""
        if self.targets is None or not self.has_targets:
            return
        for begin in range(0, self.count, LOOKED_AT_ONCE):
            found = self.targets(np.arange(begin, min(self.count, begin + LOOKED_AT_ONCE)))
            if found is not None:
                yield found

    def changed(self, change: Callable[[Batch], Batch], *notes: str) -> Rows:
        """Return the source whose batches are changed."""
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

    def numbered(self, is_kept: Callable[[Indices], Mask]) -> Rows:
        """Return the examples whose numbers are kept."""
        return self._among(np.flatnonzero(is_kept(np.arange(self.count))))

    def where(self, holds: Callable[[Arrays], Mask]) -> Rows:
        """Return the examples with targets for which something holds."""
        labels = self.labels() if self.targets is not None else self._labels_with_inputs()
        masks = [holds(label) for label in labels]
        return self._among(np.flatnonzero(np.concatenate(masks)) if masks else np.zeros(0, np.int64))

    def first(self, count: int) -> Rows:
        """Return at most that many examples from the beginning."""
        return replace(self, count=min(count, self.count))

    def _labels_with_inputs(self) -> Iterator[Arrays]:
        for batch in self.batches(Order(256)):
            if batch.y is not None:
                yield batch.y

    def _among(self, numbers: Indices) -> Rows:
        take, targets = self.take, self.targets
        return replace(
            self,
            count=len(numbers),
            take=lambda chosen: take(numbers[chosen]),
            targets=None if targets is None else lambda chosen: targets(numbers[chosen]),
        )

    def _numbers(self, order: Order) -> Indices:
        found = order.random.permutation(self.count) if order.is_shuffled else np.arange(self.count)
        whole = self.count // order.ranks * order.ranks
        return found[order.rank : whole : order.ranks] if order.ranks > 1 else found
