"""Examples that come one after the other, from files too big to hold or from code."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from prunectl.training.data.ahead import read_ahead
from prunectl.training.data.pieces import beginning, joined, length, nbytes, rebatched, shared_out, skipped, taken
from prunectl.training.data.source import Arrays, Batch, Indices, Mask, Order

SHUFFLED_EXAMPLES = 10_000
SHUFFLED_BYTES = 64 << 20
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Stream:
    """A source that is read from its beginning each time."""

    name: str
    count: int | None
    has_targets: bool
    read: Callable[[], Iterator[Batch]]
    """All examples, in pieces of any size."""
    is_random: bool = False
    notes: tuple[str, ...] = ()

    def batches(self, order: Order) -> Iterator[Batch]:
        """Yield the batches of one epoch."""
        pieces = shuffled(self.read(), order.random) if order.is_shuffled else self.read()
        mine = shared_out(pieces, order.rank, order.ranks)
        return read_ahead(skipped(rebatched(mine, order.batch_size), order.skip), order.workers)

    def labels(self) -> Iterator[Arrays]:
        """Yield nothing: targets come only with their inputs."""
        return iter(())

    def changed(self, change: Callable[[Batch], Batch], *notes: str) -> Stream:
        """Return the source whose batches are changed."""
        read = self.read
        return replace(self, read=lambda: map(change, read()), notes=(*self.notes, *notes))

    def numbered(self, is_kept: Callable[[Indices], Mask]) -> Stream:
        """Return the examples whose numbers are kept."""
        read = self.read

        def chosen() -> Iterator[Batch]:
            begin = 0
            for piece in read():
                end = begin + length(piece)
                yield taken(piece, is_kept(np.arange(begin, end)))
                begin = end

        known = None if self.count is None else int(is_kept(np.arange(self.count)).sum())
        return replace(self, count=known, read=lambda: filter(length, chosen()))

    def where(self, holds: Callable[[Arrays], Mask]) -> Stream:
        """Return the examples with targets for which something holds."""
        read = self.read

        def chosen() -> Iterator[Batch]:
            for piece in read():
                if piece.y is not None:
                    yield taken(piece, holds(piece.y))

        return replace(self, count=None, read=lambda: filter(length, chosen()))

    def first(self, count: int) -> Stream:
        """Return at most that many examples from the beginning."""
        read = self.read
        known = None if self.count is None else min(count, self.count)
        return replace(self, count=known, read=lambda: beginning(read(), count))


def shuffled(pieces: Iterable[Batch], random: np.random.Generator) -> Iterator[Batch]:
    """Yield examples in an order that is random within a pool of the next thousands."""
    pool: list[Batch] = []
    count = held_bytes = 0
    for piece in pieces:
        pool.append(piece)
        count += length(piece)
        held_bytes += nbytes(piece)
        if count > 1 and (count >= SHUFFLED_EXAMPLES or held_bytes >= SHUFFLED_BYTES):
            whole = joined(pool)
            order = random.permutation(count)
            # Half of the pool stays, to mix with what comes next.
            yield taken(whole, order[count // 2 :])
            rest = taken(whole, order[: count // 2])
            pool, count, held_bytes = [rest], count // 2, nbytes(rest)
    if pool:
        yield taken(joined(pool), random.permutation(count))


def in_pieces(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield items in lists of one size; the last may be smaller."""
    held: list[Item] = []
    for item in items:
        held.append(item)
        if len(held) == size:
            yield held
            held = []
    if held:
        yield held
