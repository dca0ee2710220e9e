"""Arrays of the same length as a source."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from prunectl.errors import InputError
from prunectl.formats.base import Array
from prunectl.training.data.rows import Rows
from prunectl.training.data.source import Arrays, Batch, Indices, mapped

NUMERIC = "fiub"
"""Kinds of numbers that a model can be fed: floats, integers, signed or not, and booleans."""


def from_arrays(name: str, x: Mapping[str, Array], y: Mapping[str, Array], *notes: str) -> Rows:
    """Return the examples that arrays hold along their first axes, by the arrays' names."""
    named = {**x, **y}
    for title, array in named.items():
        if array.ndim == 0:
            raise InputError(f"{name}: {title} is a single number, and no array of examples")
    lengths = {title: len(array) for title, array in named.items()}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{title} has {length}" for title, length in lengths.items())
        raise InputError(f"{name}: the arrays differ in their number of examples: {said}")
    inputs, targets = _together(x), _together(y) if y else None

    def of(arrays: Arrays, numbers: Indices) -> Arrays:
        return mapped(lambda array: np.asarray(array[_run(numbers)]), arrays)

    def take(numbers: Indices) -> Batch:
        return Batch(of(inputs, numbers), None if targets is None else of(targets, numbers))

    return Rows(
        name,
        next(iter(lengths.values())),
        targets is not None,
        take,
        None if targets is None else lambda numbers: of(targets, numbers),
        notes=notes,
    )


def _together(arrays: Mapping[str, Array]) -> Arrays:
    found = tuple(arrays.values())
    return found[0] if len(found) == 1 else found


def _run(numbers: Indices) -> slice | Indices:
    """Return numbers that follow each other as a slice, which copies nothing."""
    if len(numbers) and numbers[-1] - numbers[0] == len(numbers) - 1 and (np.diff(numbers) == 1).all():
        return slice(int(numbers[0]), int(numbers[-1]) + 1)
    return numbers
