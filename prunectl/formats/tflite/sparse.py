"""Sparse tensors of TensorFlow Lite, unfolded: levels of dense or compressed dimensions, perhaps in blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunectl.formats.tflite.flatbuffer import FlatBufferError, Table

_COMPRESSED = 1
_INDEX_TYPES: dict[int, type[np.generic]] = {1: np.int32, 2: np.uint16, 3: np.uint8}
_MAX_LEVELS = 64


@dataclass(frozen=True, slots=True)
class _Level:
    """One dimension in the order of storage."""

    size: int
    segments: NDArray[np.int64] | None
    """Where the children of each parent begin; None when the dimension is dense."""
    indices: NDArray[np.int64]


def unfold(sparsity: Table, shape: tuple[int, ...], values: NDArray[Any]) -> NDArray[Any]:
    """Return the dense tensor whose non-zero blocks are ``values``."""
    order, blocks = (sparsity.numbers(field, np.int32, _MAX_LEVELS + 1).tolist() for field in (0, 1))
    levels = [_level(found) for found in sparsity.children(2, _MAX_LEVELS)]
    rank = len(shape)
    if sorted(order) != list(range(rank + len(blocks))) or len(levels) != len(order):
        raise FlatBufferError("a sparse tensor does not say in which order it is stored")
    if any(not 0 <= axis < rank for axis in blocks) or len(set(blocks)) != len(blocks):
        raise FlatBufferError("a sparse tensor is cut in blocks along an axis that it lacks")
    spots = _walk(levels, max([len(values), *(len(level.segments) for level in levels if level.segments is not None)]))
    if len(spots[0]) != len(values):
        raise FlatBufferError(f"a sparse tensor holds {len(values)} values for {len(spots[0])} places")
    by_number = {number: (spot, level.size) for number, spot, level in zip(order, spots, levels, strict=True)}
    places = []
    for axis, size in enumerate(shape):
        place = by_number[axis][0]
        if axis in blocks:
            inner, width = by_number[rank + blocks.index(axis)]
            place = place * width + inner
        if place.size and not 0 <= place.min() <= place.max() < size:
            raise FlatBufferError("a sparse tensor names a place outside of its shape")
        places.append(place)
    dense = np.zeros(shape, values.dtype)
    dense[tuple(places)] = values
    return dense


def _level(facts: Table) -> _Level:
    if facts.number(0, 1) != _COMPRESSED:
        return _Level(facts.number(1, 4, is_signed=True), None, np.zeros(0, np.int64))
    return _Level(0, _numbers(facts, 2), _numbers(facts, 4))


def _numbers(facts: Table, field: int) -> NDArray[np.int64]:
    kind, values = _INDEX_TYPES.get(facts.number(field, 1)), facts.child(field + 1)
    if kind is None or values is None:
        raise FlatBufferError("a sparse tensor lacks its indices")
    return values.numbers(0, kind)


def _walk(levels: list[_Level], limit: int) -> list[NDArray[np.int64]]:
    """Return the index of every value along each level.

    No level has more places than there are values, or segments of the level below: ``limit`` is the most of these.
    """
    spots: list[NDArray[np.int64]] = []
    count = 1
    for level in levels:
        if level.segments is None:
            if level.size < 0 or count * level.size > limit:
                raise FlatBufferError("a sparse tensor claims more places than it has values")
            spots = [np.repeat(spot, level.size) for spot in spots]
            spots.append(np.tile(np.arange(level.size), count))
        else:
            widths = np.diff(level.segments)
            if len(widths) != count or (widths < 0).any() or int(widths.sum()) != len(level.indices):
                raise FlatBufferError("a sparse tensor's segments do not fit its indices")
            spots = [np.repeat(spot, widths) for spot in spots]
            spots.append(level.indices)
        count = len(spots[-1])
    return spots or [np.zeros(1, np.int64)]
