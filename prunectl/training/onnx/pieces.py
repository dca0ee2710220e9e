"""A batch cut into pieces of the size that a model takes, the last one filled up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from prunectl.formats.base import Array
from prunectl.training.onnx.look import Ran


@dataclass(frozen=True, slots=True)
class Piece:
    """What goes in at a time."""

    feeds: Mapping[str, Array]
    ran: int
    count: int
    """Examples of the batch; the rest repeats the first of them."""

    def left(self, values: Mapping[str, Array]) -> Ran:
        """Return what a pass left behind, which tells what only filled it up."""
        return Ran(values, self.ran, self.count) if self.count < self.ran else Ran(values)


def pieces(feeds: Mapping[str, Array], size: int | None) -> Iterator[Piece]:
    """Yield the pieces of a batch, or all of it if any number may go in."""
    total = max((len(array) for array in feeds.values() if array.ndim), default=0)
    if size is None or size == total:
        yield Piece(feeds, total, total)
        return
    for begin in range(0, total, size):
        part = {name: array[begin : begin + size] for name, array in feeds.items()}
        count = min(size, total - begin)
        yield Piece({name: _filled(array, size) for name, array in part.items()}, size, count)


def joined(found: Sequence[tuple[Piece, Array]]) -> Array | None:
    """Return what came out of the pieces as one array; none if its examples cannot be told."""
    first, array = found[0]
    if len(found) == 1 and first.count == first.ran:
        return array
    axis = Ran({}, first.ran).axis(array.shape)
    cut = [Ran({}, piece.ran, piece.count).real(array, array.ndim) for piece, array in found]
    if axis is None:
        return None
    return np.concatenate([array for array in cut if array is not None], axis=axis)


def _filled(array: Array, size: int) -> Array:
    return np.concatenate([array, np.repeat(array[:1], size - len(array), axis=0)])
