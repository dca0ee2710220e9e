"""The same numbers along other axes: one more or one less of a single element, or channels at the other end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prunectl.formats.base import Array

Shape = Sequence[int | None]
_TO_FIRST, _TO_LAST = (2, 0, 1), (1, 2, 0)


@dataclass(frozen=True, slots=True)
class Layout:
    """Another order of axes, then others of a single element."""

    said: str
    order: tuple[int, ...] = ()
    """Axes of an example in their new order; empty leaves them."""
    wanted: tuple[int | None, ...] = ()
    """Axes of an example once those of a single element are put in or dropped; empty leaves them."""

    def apply(self, array: Array) -> Array:
        """Return the array with the axes of its examples changed."""
        if self.order:
            return np.ascontiguousarray(array.transpose(0, *(axis + 1 for axis in self.order)))
        # An axis whose length the model leaves open keeps the one that it has in this batch.
        lengths = iter(length for length in array.shape[1:] if length != 1)
        return array.reshape(len(array), *(1 if length == 1 else next(lengths) for length in self.wanted))


def matches(shape: Shape, wanted: Shape) -> bool:
    """Whether a shape is one that is asked for, where None takes any length."""
    return len(shape) == len(wanted) and all(
        length is None or length == found for found, length in zip(shape, wanted, strict=True)
    )


def between(shape: tuple[int, ...], wanted: tuple[int | None, ...] | None) -> Layout | None:
    """Return the one clear way from a shape to another; None if there is none, or nothing to do."""
    if wanted is None or matches(shape, wanted):
        return None
    longer = [length for length in shape if length != 1]
    if matches(longer, [length for length in wanted if length != 1]):
        return Layout(f"{text(shape)} is read as {text(wanted)}", wanted=wanted)
    orders = [order for order in (_TO_FIRST, _TO_LAST) if len(shape) == 3]
    fitting = [order for order in orders if matches([shape[axis] for axis in order], wanted)]
    if len(fitting) != 1:
        return None
    ends = "first" if fitting[0] == _TO_FIRST else "last"
    return Layout(f"{text(shape)} becomes {text(wanted)}: channels come {ends}", order=fitting[0])


def text(shape: Shape) -> str:
    """Return a shape as users write it."""
    return "x".join("?" if length is None else str(length) for length in shape) or "a single number"
