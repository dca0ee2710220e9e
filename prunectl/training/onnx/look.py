"""A way to see one meeting of a tensor and its inputs, once the graph has run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from prunectl.formats.base import Array
from prunectl.training.sights import Use


@dataclass(frozen=True, slots=True)
class Ran:
    """What a pass through the graph left behind."""

    values: Mapping[str, Array]
    ran: int | None = None
    """Examples that went through, if some of them only filled up the batch."""
    count: int = 0
    """Those that did not."""

    def __getitem__(self, name: str) -> Array:
        return self.values[name]

    def axis(self, shape: tuple[int, ...]) -> int | None:
        """Return which axis counts the examples: the first of that length, else one that counts parts of each."""
        assert self.ran is not None
        exact = (axis for axis, length in enumerate(shape) if length == self.ran)
        parts = (axis for axis, length in enumerate(shape) if length and length % self.ran == 0)
        return next(exact, next(parts, None))

    def real(self, array: Array, axes: int) -> Array | None:
        """Return an array without what only filled up the batch, where one of the first axes counts the examples."""
        if self.ran is None:
            return array
        axis = self.axis(array.shape[:axes])
        if axis is None:
            return None
        kept = array.shape[axis] // self.ran * self.count
        found: Array = array[(slice(None),) * axis + (slice(kept),)]
        return found


@dataclass(frozen=True, slots=True)
class Look:
    """What must be known, and how it is then shown."""

    needs: tuple[str, ...]
    """Names of values."""
    show: Callable[[Ran], Iterator[tuple[Array, Use]]]
