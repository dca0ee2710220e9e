"""Which initializer is which weight of the source: told by its numbers, since converters name them as they like."""

from __future__ import annotations

import hashlib

import numpy as np

from prunectl.formats.base import Array, ModelFile

_ORDERS: tuple[tuple[int, ...], ...] = ((1, 0), (3, 2, 0, 1), (2, 1, 0), (4, 3, 0, 1, 2), (2, 3, 0, 1))
"""How converters turn kernels around."""


def known_weights(file: ModelFile) -> dict[str, str]:
    """Return the names of weights by their marks, in every order of axes; nothing of numbers that are there twice."""
    found: dict[str, str] = {}
    doubled: set[str] = set()
    for tensor in file.tensors:
        if tensor.size < 2 or tensor.name in file.copies or not tensor.is_float:
            continue
        array = file.read(tensor)
        orders = [order for order in _ORDERS if len(order) == array.ndim]
        for one in {mark(array), *(mark(array.transpose(order)) for order in orders)}:
            if one in found:
                doubled.add(one)
            found[one] = tensor.name
    return {one: name for one, name in found.items() if one not in doubled}


def mark(array: Array) -> str:
    """Return what stands for the numbers of an array, its shape and its type."""
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes())
    digest.update(repr((array.shape, array.dtype.name)).encode())
    return digest.hexdigest()
