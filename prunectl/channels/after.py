"""How long is every axis of every value once some channels are gone?"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from prunectl.channels.trace import Trace


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
                after[axis] = int((~np.isin(self.trace.labels.roots(line), self._gone)).sum())
        return tuple(after)

    def before(self, name: str, axis: int, place: int) -> int:
        """Return how many indices of an axis are left before a place."""
        labels = self.trace.of(name)
        line = self.trace.labels.along(labels, axis)
        if line is None:
            return place
        return int((~np.isin(self.trace.labels.roots(line[:place]), self._gone)).sum())

    def has_changed(self, name: str) -> bool:
        """Whether a value is smaller than it was."""
        is_known = name in self.trace.values and name in self.trace.graph.shapes
        return is_known and self.shape(name) != self.trace.shape(name)
