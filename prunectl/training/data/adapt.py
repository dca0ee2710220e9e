"""Adapts data to a model where only one conversion is possible, with a note for the user, and checks the result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prunectl.errors import InputError, UsageError
from prunectl.formats.base import Array
from prunectl.training.backend import ModelSignature, TensorSpec
from prunectl.training.data.readers import NUMERIC, IndexedSource
from prunectl.training.data.source import Arrays, Batch, EpochOrder, Source, as_tuple, nbytes, num_examples, peek
from prunectl.training.task import IGNORED_LABEL, Task, TaskKind, format_shape, infer_task, label_axis, shape_matches

_BYTE = np.dtype(np.uint8)
_FLOAT = np.dtype(np.float32)
_WHOLE = np.dtype(np.int64)
_KEPT_FLOATS = frozenset({"float16", "float64"})
"""Dtypes of inputs that floats are cast to; for any other float, such as bfloat16, they become float32."""


@dataclass(frozen=True, slots=True)
class Cast:
    """A conversion of an array to another dtype."""

    dtype: np.dtype[Any]
    note: str

    def apply(self, array: Array, what: str) -> Array:
        """Cast an array; refuse a cast to integers that changes any value."""
        with np.errstate(invalid="ignore", over="ignore"):
            result = array.astype(self.dtype)
        if self.dtype.kind in "iu" and not np.array_equal(result, array):
            raise InputError(f"{what} must be whole numbers that fit into {self.dtype}, but some are not")
        return result


def input_cast(given: np.dtype[Any], expected: str) -> Cast | None:
    """The cast of an input to a model's dtype; if that is unknown, floats and unsigned integers become float32."""
    if expected.startswith(("int", "uint", "bool")):
        return None if given == expected else Cast(np.dtype(expected), f"{given} is cast to {expected}")
    dtype = np.dtype(expected) if expected in _KEPT_FLOATS else _FLOAT
    if given == dtype or (not expected and given.kind in "bi"):
        return None
    note = f"{given} is cast to {dtype}"
    if given == _BYTE:
        note += " without scaling; for a model trained on x / 255 add ?norm=unit, on x / 16 ?norm=/16"
    return Cast(dtype, note)


def target_cast(given: np.dtype[Any]) -> Cast | None:
    """The cast of targets to int64 or float32, which losses take."""
    dtype = _FLOAT if given.kind == "f" else _WHOLE
    return None if given == dtype else Cast(dtype, f"{given} is cast to {dtype}")


_TO_FIRST, _TO_LAST = (2, 0, 1), (1, 2, 0)


@dataclass(frozen=True, slots=True)
class AxisChange:
    """A transposition of the axes of examples, or the insertion and removal of axes of length 1."""

    note: str
    order: tuple[int, ...] = ()
    """Axes of an example in their new order; empty for no transposition."""
    wanted: tuple[int | None, ...] = ()
    """Shape of an example after axes of length 1 are inserted or removed; empty for no change."""

    def apply(self, array: Array) -> Array:
        """The array with the axes of its examples changed."""
        if self.order:
            return np.ascontiguousarray(array.transpose(0, *(axis + 1 for axis in self.order)))
        # An axis without a fixed length in the model keeps its length in this batch.
        lengths = iter(length for length in array.shape[1:] if length != 1)
        return array.reshape(len(array), *(1 if length == 1 else next(lengths) for length in self.wanted))


def find_axis_change(shape: tuple[int, ...], expected: tuple[int | None, ...] | None) -> AxisChange | None:
    """The only unambiguous change from one shape to another; None if there is none, or none is needed."""
    if expected is None or shape_matches(shape, expected):
        return None
    longer = [length for length in shape if length != 1]
    if shape_matches(longer, [length for length in expected if length != 1]):
        return AxisChange(
            f"examples of {format_shape(shape)} are reshaped to {format_shape(expected)}", wanted=expected
        )
    orders = [order for order in (_TO_FIRST, _TO_LAST) if len(shape) == 3]
    fitting = [order for order in orders if shape_matches([shape[axis] for axis in order], expected)]
    if len(fitting) != 1:
        return None
    ends = "first" if fitting[0] == _TO_FIRST else "last"
    return AxisChange(
        f"examples of {format_shape(shape)} are transposed to {format_shape(expected)} (channels {ends})",
        order=fitting[0],
    )


@dataclass(frozen=True, slots=True)
class ArrayAdapter:
    """The conversions of one array of every batch."""

    title: str
    layout: AxisChange | None = None
    cast: Cast | None = None

    def apply(self, array: Array) -> Array:
        """The converted array."""
        shaped = self.layout.apply(array) if self.layout else array
        return self.cast.apply(shaped, self.title) if self.cast else shaped

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user on the conversions."""
        parts = (self.layout.note if self.layout else "", self.cast.note if self.cast else "")
        return tuple(f"{self.title}: {note}" for note in parts if note)


def adapt(source: Source, signature: ModelSignature) -> tuple[Source, tuple[str, ...]]:
    """Adapt a source to a model where that is unambiguous; returns notes on everything that was changed."""
    head = peek(source, 1)
    if head is None:
        raise InputError(f"{source.name} has no examples")
    inputs, targets = as_tuple(head.x), () if head.y is None else as_tuple(head.y)
    if len(inputs) != len(signature.inputs):
        names = ", ".join(port.name for port in signature.inputs)
        raise UsageError(
            f"{source.name} has {_input_count(len(inputs))}, but the model has {len(signature.inputs)} ({names})",
            hint="give one for each, by these names or in this order: train.npz[a+b,labels] or a.npy+b.npy,y.npy",
        )
    xs = [
        _input_adapter(array_name(source.name, "x", index, len(inputs)), array, port)
        for index, (array, port) in enumerate(zip(inputs, signature.inputs, strict=True))
    ]
    ys = [
        ArrayAdapter(array_name(source.name, "y", index, len(targets)), None, target_cast(array.dtype))
        for index, array in enumerate(targets)
    ]

    def change(batch: Batch) -> Batch:
        return Batch(apply_each(xs, batch.x), None if batch.y is None else apply_each(ys, batch.y))

    notes = (*source.notes, *(note for adapter in (*xs, *ys) for note in adapter.notes))
    return source.map_batches(change), tuple(dict.fromkeys(notes))


def array_name(name: str, side: str, index: int, count: int) -> str:
    """The name of an array of a source in messages."""
    return f"{side} of {name}" if count == 1 else f"{side}[{index}] of {name}"


def _input_adapter(name: str, array: Array, port: TensorSpec) -> ArrayAdapter:
    return ArrayAdapter(name, find_axis_change(array.shape[1:], port.shape), input_cast(array.dtype, port.dtype))


def apply_each(adapters: Sequence[ArrayAdapter], arrays: Arrays) -> Arrays:
    """Convert each array with its own adapter."""
    adapted = tuple(adapter.apply(array) for adapter, array in zip(adapters, as_tuple(arrays), strict=True))
    return adapted if isinstance(arrays, tuple) else adapted[0]


def _input_count(count: int) -> str:
    return "1 input" if count == 1 else f"{count} inputs"


def infer_tasks(signature: ModelSignature, example: Batch) -> tuple[Task, ...]:
    """The task of each output that has targets, inferred from a first batch; unknown if the output's shape is."""
    return tuple(
        Task(TaskKind.UNKNOWN)
        if output.shape is None
        else infer_task(output.shape, output.activation, targets, is_channels_first=signature.is_channels_first)
        for output, targets in zip(
            signature.outputs, as_tuple(example.y) if example.y is not None else (), strict=False
        )
    )


def check_labels(y: Arrays, tasks: Sequence[Task], signature: ModelSignature, *, name: str, begin: int) -> None:
    """Refuse classification targets that are neither labels from 0 to classes - 1 nor a number for each class."""
    arrays = as_tuple(y)
    for index, (array, task, output) in enumerate(zip(arrays, tasks, signature.outputs, strict=False)):
        if task.classes is None or output.shape is None or shape_matches(array.shape[1:], output.shape):
            continue
        what = array_name(name, "y", index, len(arrays))
        if label_axis(output.shape, array.shape[1:], is_channels_first=signature.is_channels_first) is None:
            raise UsageError(
                f"{what} has the shape {format_shape(array.shape[1:])} for each example, "
                f"but the output of the model has {format_shape(output.shape)}",
                hint="a target is one label, or one number for each class (made with ?onehot=N)",
            )
        _check_range(array, task.classes, what, begin, signature.ignored_label)


def _check_range(y: Array, classes: int, what: str, begin: int, ignored: int | None) -> None:
    rows = y.reshape(len(y), -1)
    if y.dtype.kind == "f" and not np.array_equal(rows, np.trunc(rows)):
        row, column = np.argwhere(rows != np.trunc(rows))[0]
        raise InputError(
            f"{what}: {rows[row, column]:g} in example {begin + row} is not a label: labels are whole numbers"
        )
    wrong = ((rows < 0) | (rows >= classes)) & (rows != ignored if ignored is not None else True)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise UsageError(
            f"{what}: the label {int(rows[row, column])} in example {begin + row} is outside 0 to {classes - 1}: "
            f"the model has {classes} classes",
            hint="select classes with ?classes=0,3,5&relabel=1, or number the labels from 0",
        )


CHECKED_BYTES = 256 << 20
CHECKED_EXAMPLES = 2048
"""The limit for a stream, which may be endless and slow."""
_CHECKED_AT_ONCE = 256


def check_batches(
    source: Source, signature: ModelSignature, *, needs_targets: bool, tasks: Sequence[Task] = ()
) -> tuple[str, ...]:
    """Check the first batches of a source, and all labels if they can be read alone; returns notes for the user."""
    if needs_targets:
        require_targets(source, signature)
    checked, is_scored = 0, False
    for batch in _first_batches(source):
        _check_inputs(source, batch, signature, checked)
        if batch.y is not None:
            _check_targets(source, batch.y, signature, tasks, checked)
        is_scored |= batch.y is None or any((array != signature.ignored_label).any() for array in as_tuple(batch.y))
        checked += num_examples(batch)
    if not checked:
        raise InputError(f"{source.name} has no examples", hint="check its options, such as limit and classes")
    # Only if the whole source was checked.
    if not is_scored and (checked == source.count or (source.count is None and checked < CHECKED_EXAMPLES)):
        raise nothing_counts(source.name)
    begin = 0
    for targets in source.labels():
        _check_targets(source, targets, signature, tasks, begin)
        begin += len(as_tuple(targets)[0])
    return _notes(source, checked, are_labels_seen=begin > 0)


def nothing_counts(name: str) -> InputError:
    """The error for data whose labels are all ignored ones."""
    return InputError(f"{name} has no labels that count", hint=f"labels of {IGNORED_LABEL} are left out")


def require_targets(source: Source, signature: ModelSignature | None = None) -> None:
    """Refuse a source without targets."""
    text = signature.text if signature is not None else None
    if not source.has_targets and text is not None and not text.is_causal:
        raise UsageError(
            f"{source.name} has no targets: {text.folder} is not a causal language model, "
            "whose target is the next token",
            hint="text alone trains and measures causal models, such as GPT or Llama; else name data with targets",
        )
    if not source.has_targets:
        raise UsageError(
            f"{source.name} has inputs but no targets", hint="name both, as in x.npy,y.npy or ?target=label"
        )


def _first_batches(source: Source) -> Iterator[Batch]:
    """Yield batches in order, up to the limits of what is checked."""
    examples = checked_bytes = 0
    for batch in source.batches(EpochOrder(_CHECKED_AT_ONCE)):
        yield batch
        examples += num_examples(batch)
        checked_bytes += nbytes(batch)
        is_enough = examples >= CHECKED_EXAMPLES and not isinstance(source, IndexedSource)
        if is_enough or checked_bytes >= CHECKED_BYTES:
            return


def _check_inputs(source: Source, batch: Batch, signature: ModelSignature, begin: int) -> None:
    inputs = as_tuple(batch.x)
    if len(inputs) != len(signature.inputs):
        raise UsageError(f"{source.name} has {len(inputs)} inputs, but the model has {len(signature.inputs)}")
    for index, (array, port) in enumerate(zip(inputs, signature.inputs, strict=True)):
        what = array_name(source.name, "x", index, len(inputs))
        _check_numbers(array, what, begin)
        if port.shape is not None and not shape_matches(array.shape[1:], port.shape):
            raise UsageError(
                f"{what} has the shape {format_shape(array.shape[1:])} for each example, "
                f"but the input {port.name!r} of the model has {format_shape(port.shape)}",
                hint="reshape it with ?shape=1x28x28, or to one row with ?flatten=1",
            )
        if port.dtype.startswith(("int", "uint")) and array.dtype.kind == "f":
            raise UsageError(f"{what} is {array.dtype}, but the input {port.name!r} of the model is {port.dtype}")


def _check_targets(source: Source, y: Arrays, signature: ModelSignature, tasks: Sequence[Task], begin: int) -> None:
    targets = as_tuple(y)
    if isinstance(y, tuple) and signature.outputs and len(y) != len(signature.outputs):
        raise UsageError(f"{source.name} has {len(y)} targets, but the model has {len(signature.outputs)} outputs")
    for index, array in enumerate(targets):
        _check_numbers(array, array_name(source.name, "y", index, len(targets)), begin)
    check_labels(y, tasks, signature, name=source.name, begin=begin)


def _check_numbers(array: Array, what: str, begin: int) -> None:
    if array.dtype.kind not in NUMERIC:
        raise InputError(f"{what} holds {array.dtype}, not numbers")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        wrong = np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(axis=1))
        raise InputError(
            f"{what} holds NaN or infinity, first in example {begin + wrong[0]}",
            hint="fix or remove such examples: a single one makes every weight NaN",
        )


def _notes(source: Source, checked: int, *, are_labels_seen: bool) -> tuple[str, ...]:
    if source.count == checked:
        return ()
    of = "" if source.count is None else f" of {source.count:,}"
    but = ", and all labels" if are_labels_seen else ""
    return (f"{source.name}: only the first {checked:,}{of} examples were checked{but}",)
