"""Which tensors show the same stored numbers, so that totals count these once."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Container, Iterable

from prunectl.formats.base import WEIGHTS, Tensor

Run = tuple[int, int, str]
"""Bytes of a storage from the first to behind the last, and the tensor that stands for them."""


def ties(tensors: Iterable[Tensor], first: Container[str] = ()) -> dict[str, str]:
    """Return the names of tensors that overlap one that stands for them, with the name of that one.

    Views of different parts of one storage, such as the weights of a recurrent layer in one buffer, are not tied.
    Of those that are, the biggest stands for the others, the first of equal ones; one of those that come first, if any.
    """
    found: dict[str, str] = {}
    taken: defaultdict[str, list[Run]] = defaultdict(list)
    for tensor in sorted(tensors, key=lambda one: (one.name not in first, one.role not in WEIGHTS, -one.size)):
        runs, run = taken[tensor.storage.key], _run(tensor)
        place = bisect_right(runs, run)
        around = (other for other in runs[max(place - 1, 0) : place + 1] if other[0] < run[1] and run[0] < other[1])
        owner = next(around, None)
        if owner is not None:
            found[tensor.name] = owner[2]
        elif tensor.size:
            runs.insert(place, run)
    return found


def _run(tensor: Tensor) -> Run:
    length = tensor.size
    if tensor.strides is not None and tensor.size:
        length = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.strides, strict=True))
    begin = tensor.start * tensor.dtype.itemsize
    return begin, begin + length * tensor.dtype.itemsize, tensor.name
