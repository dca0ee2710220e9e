"""Matches Keras variables to the tensors of a file by probing.

A copy of the file is written in which every element of a tensor is the tensor's number, and Keras loads it: the number
in a variable then identifies its tensor. This works for every version of Keras and every file layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.errors import InputError
from prunectl.formats.base import Array, ModelFile, Role, Tensor
from prunectl.formats.patch import TensorUpdate
from prunectl.formats.registry import by_name, load
from prunectl.formats.scratch import temporary_folder
from prunectl.training.keras import backend
from prunectl.training.keras.backend import KerasLibrary
from prunectl.training.quiet import ignore_warnings

_SKIPPED_ROLES = frozenset({Role.OPTIMIZER})
_CHUNK = 1 << 20
_BASES = {"float16": 1 << 11, "bfloat16": 1 << 8, "float32": 1 << 24, "float64": 1 << 53}
"""The integers up to these are all exact in a floating-point type."""
_MIN_BASE = 8
"""The base for the smallest floating-point types."""


def match_variables(
    file: ModelFile, library: KerasLibrary, variables: Sequence[Any], fill: Callable[[Path], None]
) -> dict[str, Any]:
    """Keras variables by the names of their tensors in the file."""
    tensors = [tensor for tensor in file.tensors if tensor.role not in _SKIPPED_ROLES and tensor.size]
    nonempty = [variable for variable in variables if np.prod(backend.shape(variable), dtype=np.int64)]
    values = [backend.get_value(library, variable) for variable in nonempty]
    try:
        marks = _probe(file, library, tensors, nonempty, fill)
    finally:
        for variable, value in zip(nonempty, values, strict=True):
            backend.set_value(variable, value)
    matched = {}
    for variable, value, mark in zip(nonempty, values, marks, strict=True):
        if mark:
            tensor = tensors[mark - 1]
            _check_same(file, tensor, value)
            matched[tensor.name] = variable
    return matched


def _probe(
    file: ModelFile,
    library: KerasLibrary,
    tensors: Sequence[Tensor],
    variables: Sequence[Any],
    fill: Callable[[Path], None],
) -> list[int]:
    """The number of each variable's tensor, counted from 1; 0 if it has none."""
    base = min(
        (_digit_base(dtype) for dtype in (*(tensor.dtype for tensor in tensors), *map(backend.dtype, variables))),
        default=2,
    )
    marks, weight = [0] * len(variables), 1
    while weight <= len(tensors):
        for variable in variables:
            backend.set_value(variable, np.zeros(backend.shape(variable), backend.dtype(variable)))
        digits = {tensor.name: (index + 1) // weight % base for index, tensor in enumerate(tensors)}
        with temporary_folder() as scratch, ignore_warnings():
            fill(_write_probe(file, tensors, digits, scratch))
        for index, variable in enumerate(variables):
            marks[index] = _add_digit(marks[index], backend.get_value(library, variable), weight)
        weight *= base
    return [max(mark, 0) for mark in marks]


def _add_digit(before: int, array: Array, weight: int) -> int:
    """Add a digit to a number; -1 if the elements differ, as in a variable composed of several tensors."""
    first = array.reshape(-1)[0]
    if before < 0 or not np.all(array == first):
        return -1
    return before + int(first) * weight


def _digit_base(dtype: np.dtype[Any]) -> int:
    if dtype.kind in "iu":
        return int(np.iinfo(dtype).max)
    if dtype.kind == "b":
        return 2
    return _BASES.get(dtype.name, _MIN_BASE)


def _write_probe(file: ModelFile, tensors: Iterable[Tensor], digits: dict[str, int], scratch: Path) -> Path:
    """Write a copy of a file in which each tensor is filled with a digit; returns its path."""
    rewrites: dict[tuple[str, int], TensorUpdate] = {}
    for tensor in tensors:
        # Tensors that share their bytes count as one, under the name that comes first.
        key = (tensor.storage.key, tensor.start)
        rewrites.setdefault(key, TensorUpdate(tensor, partial(_filled, tensor, digits[tensor.name])))
    target = scratch / file.path.name
    paths = {path: scratch / path.relative_to(file.path.parent) for path in file.files}
    for path in paths.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    load(by_name(file.format).writer)(file, paths, tuple(rewrites.values()))
    return target


def _filled(tensor: Tensor, digit: int) -> Iterator[Array]:
    for begin in range(0, tensor.size, _CHUNK):
        yield np.full(min(_CHUNK, tensor.size - begin), digit, tensor.dtype)


def _check_same(file: ModelFile, tensor: Tensor, value: Array) -> None:
    """Refuse a file whose weights Keras rearranges on loading: they could not be written back."""
    stored = file.read(tensor)
    if value.shape != tensor.shape or not np.array_equal(
        value, stored.astype(value.dtype), equal_nan=value.dtype.kind != "b"
    ):
        raise InputError(
            f"{file.path} stores {tensor.name} in the layout of an older Keras ({file.about.producer or 'unnamed'})",
            hint="load it in Keras, save it again, and use that file",
        )
