"""How a tensor sees its storage, and whether it can."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.errors import InputError, abbreviated
from prunectl.formats.base import Tensor
from prunectl.formats.budgets import MAX_VIEWED_BYTES, MAX_VIEWED_TIMES
from prunectl.formats.torch.dtypes import DTYPES, STORAGES
from prunectl.formats.torch.values import Global, Made, Persistent, shown

MAX_RANK = 64
MAX_REPEATS = 64
"""How often a view may use each element of its storage on average."""
MAX_EXPANDED = 1 << 28
"""How many elements a view may make out of few by a stride of zero."""
MAX_LENGTH = 1 << 48

_UTILS = "torch._utils"
PLAIN = frozenset(
    {f"{_UTILS}.{name}" for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_qtensor")}
)
"""Calls that see a storage as a tensor; the first four arguments are the same."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A storage as the pickle words it."""

    key: str
    dtype: np.dtype[Any]
    count: int
    first: int = 0
    """The first element that a view of the storage sees."""

    @property
    def nbytes(self) -> int:
        """Bytes that the container must hold."""
        return self.count * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class View:
    """A tensor as a view of its storage."""

    stored: Stored
    dtype: np.dtype[Any]
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None


def stored(path: Path, key: Any) -> Stored:
    """Return the storage that a persistent id names."""
    if not isinstance(key, tuple) or len(key) not in {5, 6} or not isinstance(key[1], Global):
        raise InputError(f"{path} is damaged: its pickle does not say which storage it means")
    _, kind, name, _, count, *view = key
    if kind.name not in STORAGES:
        raise InputError(f"{path} holds numbers as {shown(kind.name)}, a type that prunectl does not read")
    name = str(name) if type(name) is int else name
    if not isinstance(name, str) or not _is_count(count):
        raise InputError(f"{path} is damaged: its pickle does not say which storage it means")
    first = 0
    if view and view[0] is not None:
        if not (isinstance(view[0], tuple) and len(view[0]) == 3 and _is_count(view[0][1]) and _is_count(view[0][2])):
            raise InputError(f"{path} is damaged: it does not say which part of storage {shown(name)} it means")
        first = view[0][1]
        if first + view[0][2] > count:
            raise InputError(f"{path} is damaged: a view reaches past the end of storage {shown(name)}")
    return Stored(name, DTYPES[STORAGES[kind.name]], count, first)


def view_of(path: Path, made: Made, name: str) -> View:
    """Return the view that a call would rebuild, checked against its storage."""
    key, start, shape, strides = (made.arg(index) for index in range(4))
    found = stored(path, key.id if isinstance(key, Persistent) else key)
    dtype = found.dtype
    if made.path.endswith("_v3"):
        code = made.arg(6)
        if not isinstance(code, Global) or code.name not in DTYPES:
            raise InputError(f"{path} holds {shown(name)} in a type of number that prunectl does not read")
        dtype = DTYPES[code.name]
    return see(path, name, found, dtype, (start, shape, strides))


def see(path: Path, name: str, found: Stored, dtype: np.dtype[Any], place: tuple[Any, Any, Any]) -> View:
    """Return the view of a storage from a start, a shape and strides, unless it reaches beyond it."""
    start, shape, strides = place
    if not (_are_counts(shape) and _are_counts(strides) and _is_count(start) and len(shape) == len(strides)):
        raise InputError(f"{path} is damaged: {shown(name)} has no shape that makes sense")
    first, rest = divmod(found.first * found.dtype.itemsize, dtype.itemsize)
    start += first
    size = math.prod(shape)
    elements = found.nbytes // dtype.itemsize
    last = start + sum((length - 1) * step for length, step in zip(shape, strides, strict=True)) if size else 0
    if rest or (size and last >= elements):
        raise InputError(
            f"{path} is damaged: {shown(name)} should reach up to element {last} of its storage, which has {elements}"
        )
    is_expanded = any(step == 0 and length > 1 for length, step in zip(shape, strides, strict=True))
    if size > max(MAX_REPEATS * elements, MAX_EXPANDED if is_expanded else 0):
        raise InputError(f"{path} is refused: {shown(name)} claims {size} elements of a storage that has {elements}")
    is_dense = size == 0 or _is_dense(shape, strides)
    return View(found, dtype, start if size else 0, tuple(shape), None if is_dense else tuple(strides))


def refuse_rereading(path: Path, tensors: Iterable[Tensor]) -> None:
    """Refuse a file whose tensors show the same stored bytes again and again, each in a way of its own."""
    seen: set[object] = set()
    viewed: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.view in seen:
            continue
        seen.add(tensor.view)
        steps = tensor.strides or (1,) * len(tensor.shape)
        read = math.prod(length for length, step in zip(tensor.shape, steps, strict=True) if step)
        viewed[tensor.storage.key] += read * tensor.dtype.itemsize
        if viewed[tensor.storage.key] > max(MAX_VIEWED_TIMES * tensor.storage.nbytes, MAX_VIEWED_BYTES):
            raise InputError(
                f"{path} is refused: its tensors show the {tensor.storage.nbytes} bytes of storage "
                f"{abbreviated(tensor.storage.key)} more than {MAX_VIEWED_TIMES} times"
            )


def _is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    step = 1
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1 and stride != step:
            return False
        step *= length
    return True


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_LENGTH


def _are_counts(values: Any) -> bool:
    if not isinstance(values, list | tuple) or len(values) > MAX_RANK:
        return False
    return all(_is_count(value) for value in values) and math.prod(value or 1 for value in values) <= MAX_LENGTH
