"""Whether targets are classes that a model knows."""

from __future__ import annotations

import numpy as np

from prunectl.errors import InputError, UsageError
from prunectl.formats.base import Array
from prunectl.training.data.layout import matches, text

Shape = tuple[int | None, ...]


def check(y: Array, classes: int, output: Shape | None, *, what: str, begin: int) -> None:
    """Refuse targets that are neither labels from 0 to classes - 1 nor a number for each class."""
    if _is_for_each_class(y, classes, output):
        return
    if not _is_for_each_example(y, output):
        given, wanted = text(y.shape[1:]), text(output or (classes,))
        raise UsageError(
            f"{what} is {given} for each example, and the output of the model is {wanted}",
            hint="targets are one label, or a number for each class (?onehot makes these)",
        )
    rows = y.reshape(len(y), -1)
    if y.dtype.kind == "f" and not np.array_equal(rows, np.trunc(rows)):
        row, column = np.argwhere(rows != np.trunc(rows))[0]
        raise InputError(
            f"{what}: {rows[row, column]:g} in example {begin + row} is no class: labels are whole numbers"
        )
    wrong = (rows < 0) | (rows >= classes)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise UsageError(
            f"{what}: the label {int(rows[row, column])} in example {begin + row} is outside 0 to {classes - 1}: "
            f"the model has {classes} classes",
            hint="choose classes with ?classes=0,3,5&relabel=1, or count labels from 0",
        )


def _is_for_each_class(y: Array, classes: int, output: Shape | None) -> bool:
    """Whether there is a number for each class, such as a one-hot row or a probability."""
    if y.ndim < 2 or y.shape[-1] != classes or classes < 2:
        return False
    return output is None or matches(y.shape[1:], output)


def _is_for_each_example(y: Array, output: Shape | None) -> bool:
    """Whether there is a label wherever the model answers: for each example, pixel or word."""
    if output is None:
        return True
    inner = output[:-1]
    return matches(y.shape[1:], inner) or matches(y.shape[1:], (*inner, 1))
