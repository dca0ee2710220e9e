"""Arrays adapted to what a model takes, where only one way is possible, with a note of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prunectl.errors import InputError, UsageError
from prunectl.formats.base import Array
from prunectl.training.backend import ModelSignature, TensorSpec
from prunectl.training.data.source import Arrays, Batch, Source, as_tuple, peek
from prunectl.training.task import Shape, shape_matches

_BYTE = np.dtype(np.uint8)
_FLOAT = np.dtype(np.float32)
_WHOLE = np.dtype(np.int64)
_HALVES = frozenset({"float16", "float64"})


@dataclass(frozen=True, slots=True)
class Cast:
    """From one type of numbers to another."""

    dtype: np.dtype[Any]
    note: str

    def apply(self, array: Array, what: str) -> Array:
        """The array in the other type; whole numbers must be whole and within it."""
        with np.errstate(invalid="ignore", over="ignore"):
            result = array.astype(self.dtype)
        if self.dtype.kind in "iu" and not np.array_equal(result, array):
            raise InputError(f"{what} must be whole numbers that a {self.dtype} can hold, and some are not")
        return result


def input_cast(given: np.dtype[Any], expected: str) -> Cast | None:
    """What makes an input of one type fit a model that takes another; an unknown one is taken for floats."""
    if expected.startswith(("int", "uint", "bool")):
        return None if given == expected else Cast(np.dtype(expected), f"{given} is cast to {expected}")
    dtype = np.dtype(expected) if expected in _HALVES else _FLOAT
    if given == dtype or (not expected and given.kind in "bi"):
        return None
    note = f"{given} is cast to {dtype}"
    if given == _BYTE:
        note += " as it is; a model that was trained on x / 255 needs ?norm=unit, one on x / 16 ?norm=/16"
    return Cast(dtype, note)


def target_cast(given: np.dtype[Any]) -> Cast | None:
    """What makes targets whole 64-bit or 32-bit floating-point numbers, as losses take them."""
    dtype = _FLOAT if given.kind == "f" else _WHOLE
    return None if given == dtype else Cast(dtype, f"{given} is cast to {dtype}")


_TO_FIRST, _TO_LAST = (2, 0, 1), (1, 2, 0)


@dataclass(frozen=True, slots=True)
class AxisChange:
    """Another order of axes, then others of a single element."""

    note: str
    order: tuple[int, ...] = ()
    """Axes of an example in their new order; empty leaves them."""
    wanted: tuple[int | None, ...] = ()
    """Axes of an example once those of a single element are put in or dropped; empty leaves them."""

    def apply(self, array: Array) -> Array:
        """The array with the axes of its examples changed."""
        if self.order:
            return np.ascontiguousarray(array.transpose(0, *(axis + 1 for axis in self.order)))
        # An axis whose length the model leaves open keeps the one that it has in this batch.
        lengths = iter(length for length in array.shape[1:] if length != 1)
        return array.reshape(len(array), *(1 if length == 1 else next(lengths) for length in self.wanted))


def find_axis_change(shape: tuple[int, ...], expected: tuple[int | None, ...] | None) -> AxisChange | None:
    """The one clear way from a shape to another; None if there is none, or nothing to do."""
    if expected is None or shape_matches(shape, expected):
        return None
    longer = [length for length in shape if length != 1]
    if shape_matches(longer, [length for length in expected if length != 1]):
        return AxisChange(f"{format_shape(shape)} is read as {format_shape(expected)}", wanted=expected)
    orders = [order for order in (_TO_FIRST, _TO_LAST) if len(shape) == 3]
    fitting = [order for order in orders if shape_matches([shape[axis] for axis in order], expected)]
    if len(fitting) != 1:
        return None
    ends = "first" if fitting[0] == _TO_FIRST else "last"
    return AxisChange(f"{format_shape(shape)} becomes {format_shape(expected)}: channels come {ends}", order=fitting[0])


def format_shape(shape: Shape) -> str:
    """A shape as users write it."""
    return "x".join("?" if length is None else str(length) for length in shape) or "a single number"


@dataclass(frozen=True, slots=True)
class ArrayAdapter:
    """What is done to one array of every batch."""

    title: str
    layout: AxisChange | None = None
    cast: Cast | None = None

    def apply(self, array: Array) -> Array:
        """The array as the model takes it."""
        shaped = self.layout.apply(array) if self.layout else array
        return self.cast.apply(shaped, self.title) if self.cast else shaped

    @property
    def notes(self) -> tuple[str, ...]:
        """What is done, in sentences."""
        parts = (self.layout.note if self.layout else "", self.cast.note if self.cast else "")
        return tuple(f"{self.title}: {note}" for note in parts if note)


def adapt(source: Source, signature: ModelSignature) -> tuple[Source, tuple[str, ...]]:
    """A source that fits a model as far as that is clear, and in sentences all that was decided for it."""
    head = peek(source, 1)
    if head is None:
        raise InputError(f"{source.name} has no examples")
    inputs, targets = as_tuple(head.x), () if head.y is None else as_tuple(head.y)
    if len(inputs) != len(signature.inputs):
        names = ", ".join(port.name for port in signature.inputs)
        raise UsageError(
            f"{source.name} has {_inputs(len(inputs))}, and the model has {len(signature.inputs)} ({names})",
            hint="several are joined with + in the model's order, as in train.npz[a+b,labels] or a.npy+b.npy,y.npy",
        )
    xs = [
        _input_fit(array_name(source.name, "x", index, len(inputs)), array, port)
        for index, (array, port) in enumerate(zip(inputs, signature.inputs, strict=True))
    ]
    ys = [
        ArrayAdapter(array_name(source.name, "y", index, len(targets)), None, target_cast(array.dtype))
        for index, array in enumerate(targets)
    ]

    def change(batch: Batch) -> Batch:
        return Batch(_applied(xs, batch.x), None if batch.y is None else _applied(ys, batch.y))

    notes = (*source.notes, *(note for fit in (*xs, *ys) for note in fit.notes))
    return source.changed(change), tuple(dict.fromkeys(notes))


def array_name(name: str, side: str, index: int, count: int) -> str:
    """What to call an array of a source."""
    return f"{side} of {name}" if count == 1 else f"{side}[{index}] of {name}"


def _input_fit(name: str, array: Array, port: TensorSpec) -> ArrayAdapter:
    return ArrayAdapter(name, find_axis_change(array.shape[1:], port.shape), input_cast(array.dtype, port.dtype))


def _applied(fits: Sequence[ArrayAdapter], arrays: Arrays) -> Arrays:
    adapted = tuple(fit.apply(array) for fit, array in zip(fits, as_tuple(arrays), strict=True))
    return adapted if isinstance(arrays, tuple) else adapted[0]


def _inputs(count: int) -> str:
    return "1 input" if count == 1 else f"{count} inputs"
