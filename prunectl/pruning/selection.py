"""Which k of n scores are the lowest? Exact, in constant memory, the same on any machine.

Scores are non-negative floats, whose order is that of their bits read as integers. Each pass over the scores counts
sixteen more of these bits into bins, and looks closer at the one bin in which the k-th lowest score must lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Mask = NDArray[np.bool_]
Source = Callable[[], Iterator[Array]]
"""Yields the scores of one tensor in order, block by block, each time it is called."""

_DIGIT_BITS = 16
_BINS = 1 << _DIGIT_BITS


@dataclass(frozen=True, slots=True)
class Threshold:
    """The cut: every score below the key is dropped, and so many of those that equal it."""

    key: int
    ties: tuple[int, ...]
    """How many ties go from each source, counted from its beginning."""

    def drops(self, source: int) -> Dropper:
        """Return what marks the dropped scores of one source, block by block in order."""
        return Dropper(self.key, self.ties[source])


@dataclass(slots=True)
class Dropper:
    """Marks what is dropped, and remembers how many ties are still to go."""

    key: int
    ties_left: int

    def mark(self, scores: Array) -> Mask:
        """Mark the scores of the next block that are dropped."""
        keys = as_keys(scores)
        dropped: Mask = keys < self.key
        if self.ties_left:
            tied = np.flatnonzero(keys == self.key)[: self.ties_left]
            dropped.reshape(-1)[tied] = True
            self.ties_left -= len(tied)
        return dropped


def as_keys(scores: Array) -> Array:
    """Return the bits of non-negative floats as integers of the same order; minus zero is zero."""
    whole = np.ascontiguousarray(scores)
    if whole.dtype.itemsize == 8:
        return np.asarray(whole.view(np.uint64) & np.uint64(0x7FFFFFFFFFFFFFFF))
    return np.asarray(whole.view(np.uint32) & np.uint32(0x7FFFFFFF))


def threshold(sources: Sequence[Source], drop: int) -> Threshold:
    """Return the cut that drops exactly so many scores, ties in the order of the sources."""
    if drop == 0:
        return Threshold(0, (0,) * len(sources))
    key, below, at = _kth(sources, drop)
    return Threshold(key, _share(sources, key, drop - below, at))


def _kth(sources: Sequence[Source], drop: int) -> tuple[int, int, int]:
    """Return the key of the last score to go, how many are below it, and how many equal it."""
    prefix, below, at, shift = 0, 0, 0, None
    while shift is None or shift > 0:
        counts = np.zeros(_BINS, np.int64)
        for source in sources:
            for block in source():
                keys = as_keys(block).reshape(-1)
                bits = keys.dtype.itemsize * 8
                low = (bits if shift is None else shift) - _DIGIT_BITS
                if shift is not None:
                    keys = keys[keys >> keys.dtype.type(shift) == prefix]
                digits = (keys >> keys.dtype.type(low)) & keys.dtype.type(_BINS - 1)
                counts += np.bincount(digits.astype(np.intp), minlength=_BINS)
        rising = np.cumsum(counts)
        digit = int(np.searchsorted(rising, drop - below))
        if digit == _BINS:
            raise ValueError(f"there are fewer than {drop} scores")
        below += int(rising[digit] - counts[digit])
        at = int(counts[digit])
        prefix = prefix << _DIGIT_BITS | digit
        shift = low
    return prefix, below, at


def _share(sources: Sequence[Source], key: int, ties: int, at: int) -> tuple[int, ...]:
    """Return how many of the ties each source gives, the first sources first."""
    if len(sources) == 1 or ties == at:
        return (ties,) * len(sources)
    shares = []
    for source in sources:
        held = sum(int(np.count_nonzero(as_keys(block) == key)) for block in source()) if ties else 0
        shares.append(min(held, ties))
        ties -= shares[-1]
    return tuple(shares)
