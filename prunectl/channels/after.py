"""How long is every axis of every value once some channels are gone?"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from prunectl.channels.labels import LabelArray
from prunectl.channels.trace import Trace
from prunectl.formats.base import Array
from prunectl.pruning.selection import Mask


class After:
    """A network without some of its channels."""

    def __init__(self, trace: Trace, gone: Iterable[int]) -> None:
        self.trace = trace
        self._gone = np.array(sorted(gone), np.int64)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a value without the channels that are gone."""
        before, labels = self.trace.shape(name), self.trace.of(name)
        after = list(before)
        for axis in self.trace.labels.varying(labels):
            line = self.trace.labels.along(labels, axis)
            if line is not None:
                after[axis] = int(self._stays(line).sum())
        return tuple(after)

    def before(self, name: str, axis: int, place: int) -> int:
        """Return how many indices of an axis are left before a place."""
        labels = self.trace.of(name)
        line = self.trace.labels.along(labels, axis)
        if line is None:
            return place
        return int(self._stays(line[:place]).sum())

    def without(self, name: str, array: Array) -> Array:
        """Return what is left of a value that the whole network gave."""
        labels = self.trace.of(name)
        for axis in self.trace.labels.varying(labels):
            line = self.trace.labels.along(labels, axis)
            if line is not None:
                array = np.compress(self._stays(line), array, axis)
        return array

    def _stays(self, line: LabelArray) -> Mask:
        return ~np.isin(self.trace.labels.roots(line), self._gone)

    def has_changed(self, name: str) -> bool:
        """Whether a value is smaller than it was."""
        is_known = name in self.trace.values and name in self.trace.graph.shapes
        return is_known and self.shape(name) != self.trace.shape(name)
