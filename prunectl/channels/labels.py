"""Which channels are one and the same? Labels that are united, and locked where nobody may cut."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

LabelArray: TypeAlias = NDArray[np.int64]
FIXED = 0
"""The label of what is no channel, or none that could go."""


class Labels:
    """Labels of channels, united as operations tie them together."""

    def __init__(self) -> None:
        self._parents = np.zeros(1, np.int64)
        self._reasons: dict[int, str] = {}

    def fresh(self, count: int) -> LabelArray:
        """Return labels that nothing else has."""
        made = np.arange(len(self._parents), len(self._parents) + count, dtype=np.int64)
        self._parents = np.concatenate([self._parents, made])
        return made

    def roots(self, labels: LabelArray) -> LabelArray:
        """Return one label for all that are united."""
        found = self._parents[labels]
        while not np.array_equal(found, further := self._parents[found]):
            found = further
        return found

    def unite(self, one: LabelArray, other: LabelArray, reason: str) -> None:
        """Unite labels position by position; with what is fixed, a channel is locked for that reason."""
        pairs = np.stack([part.reshape(-1) for part in compact(*np.broadcast_arrays(one, other))])
        for first, second in np.unique(self.roots(pairs), axis=1).T:
            low, high = sorted((self._root(int(first)), self._root(int(second))))
            if low == FIXED and high != FIXED:
                self._reasons.setdefault(high, reason)
            elif low != high:
                self._parents[high] = low
                if high in self._reasons:
                    self._reasons.setdefault(low, self._reasons.pop(high))

    def lock(self, labels: LabelArray, reason: str) -> None:
        """Keep channels from being cut."""
        for root in np.unique(self.roots(compact(labels)[0])):
            if root != FIXED:
                self._reasons.setdefault(int(root), reason)

    def reason(self, root: int) -> str:
        """Return why a channel is locked; empty if it is not."""
        return self._reasons.get(root, "")

    def varies(self, labels: LabelArray, axis: int) -> bool:
        """Whether labels differ along an axis."""
        (small,) = compact(labels)
        found = self.roots(small)
        return bool((found != found.take([0], axis=axis)).any()) if found.shape[axis] > 1 else False

    def varying(self, labels: LabelArray) -> tuple[int, ...]:
        """Return the axes along which labels differ."""
        return tuple(axis for axis in range(labels.ndim) if self.varies(labels, axis))

    def along(self, labels: LabelArray, axis: int) -> LabelArray | None:
        """Return one label for each index of an axis; None if other axes matter too."""
        if set(self.varying(labels)) - {axis % labels.ndim}:
            return None
        first = tuple(slice(None) if number == axis % labels.ndim else 0 for number in range(labels.ndim))
        return np.array(labels[first])

    def _root(self, label: int) -> int:
        while (parent := int(self._parents[label])) != label:
            label = parent
        return label


def compact(*arrays: LabelArray) -> tuple[LabelArray, ...]:
    """Return arrays of one shape without the repetitions of axes that all of them are only broadcast along."""
    short = tuple(
        slice(0, 1) if all(array.strides[axis] == 0 for array in arrays) else slice(None)
        for axis in range(arrays[0].ndim)
    )
    return tuple(array[short] for array in arrays)


def fixed(shape: tuple[int, ...]) -> LabelArray:
    """Return labels of what has no channels."""
    return np.broadcast_to(np.array(FIXED, np.int64), shape)


def spread(line: LabelArray, axis: int, shape: tuple[int, ...]) -> LabelArray:
    """Return the labels of an axis for a whole value."""
    place = [1] * len(shape)
    place[axis] = len(line)
    return np.broadcast_to(line.reshape(place), shape)
