"""Do examples fit a model? Adapted where only one way is possible, with a note of it, then checked before training."""

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
            raise InputError(f"{what} must be whole numbers that fit into {self.dtype}, but some are not")
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
        note += " without scaling; for a model trained on x / 255 add ?norm=unit, on x / 16 ?norm=/16"
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
            f"{source.name} has {_inputs(len(inputs))}, but the model has {len(signature.inputs)} ({names})",
            hint="give one for each, by these names or in this order: train.npz[a+b,labels] or a.npy+b.npy,y.npy",
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
        return Batch(apply_each(xs, batch.x), None if batch.y is None else apply_each(ys, batch.y))

    notes = (*source.notes, *(note for fit in (*xs, *ys) for note in fit.notes))
    return source.changed(change), tuple(dict.fromkeys(notes))


def array_name(name: str, side: str, index: int, count: int) -> str:
    """What to call an array of a source."""
    return f"{side} of {name}" if count == 1 else f"{side}[{index}] of {name}"


def _input_fit(name: str, array: Array, port: TensorSpec) -> ArrayAdapter:
    return ArrayAdapter(name, find_axis_change(array.shape[1:], port.shape), input_cast(array.dtype, port.dtype))


def apply_each(fits: Sequence[ArrayAdapter], arrays: Arrays) -> Arrays:
    """Arrays as the model takes them, each by its own adapter."""
    adapted = tuple(fit.apply(array) for fit, array in zip(fits, as_tuple(arrays), strict=True))
    return adapted if isinstance(arrays, tuple) else adapted[0]


def _inputs(count: int) -> str:
    return "1 input" if count == 1 else f"{count} inputs"


def infer_tasks(signature: ModelSignature, example: Batch) -> tuple[Task, ...]:
    """The task of each output that has targets, by what a first batch holds; none where shapes are not known."""
    return tuple(
        Task(TaskKind.UNKNOWN)
        if output.shape is None
        else infer_task(output.shape, output.ending, targets, is_channels_first=signature.is_channels_first)
        for output, targets in zip(
            signature.outputs, as_tuple(example.y) if example.y is not None else (), strict=False
        )
    )


def check_labels(y: Arrays, tasks: Sequence[Task], signature: ModelSignature, *, name: str, begin: int) -> None:
    """Refuse targets of a classifier that are neither labels from 0 to classes - 1 nor a number for each class."""
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


LOOKED_AT_BYTES = 256 << 20
LOOKED_AT_EXAMPLES = 2048
"""Of a stream, which may be endless and slow."""
_CHECKED_AT_ONCE = 256


def check_batches(
    source: Source, signature: ModelSignature, *, needs_targets: bool, tasks: Sequence[Task] = ()
) -> tuple[str, ...]:
    """What the user should know of a source that fits a model; refuse one that does not."""
    if needs_targets:
        require_targets(source, signature)
    checked, is_judged = 0, False
    for batch in _beginning(source):
        _check_inputs(source, batch, signature, checked)
        if batch.y is not None:
            _check_targets(source, batch.y, signature, tasks, checked)
        is_judged |= batch.y is None or any((array != signature.ignored_label).any() for array in as_tuple(batch.y))
        checked += num_examples(batch)
    if not checked:
        raise InputError(f"{source.name} has no examples", hint="check its options, such as limit and classes")
    # Only where nothing follows what was looked at.
    if not is_judged and (checked == source.count or (source.count is None and checked < LOOKED_AT_EXAMPLES)):
        raise nothing_counts(source.name)
    begin = 0
    for targets in source.labels():
        _check_targets(source, targets, signature, tasks, begin)
        begin += len(as_tuple(targets)[0])
    return _notes(source, checked, are_labels_seen=begin > 0)


def nothing_counts(name: str) -> InputError:
    """The refusal of data whose labels are all to be ignored."""
    return InputError(f"{name} has no labels that count", hint=f"labels of {IGNORED_LABEL} are left out")


def require_targets(source: Source, signature: ModelSignature | None = None) -> None:
    """Refuse examples that do not say what the model should answer."""
    text = signature.text if signature is not None else None
    if not source.has_targets and text is not None and not text.is_causal:
        raise UsageError(
            f"{source.name} has no targets: {text.folder} is no causal language model, whose target is the next token",
            hint="text alone trains and measures causal models, such as GPT or Llama; else name data with targets",
        )
    if not source.has_targets:
        raise UsageError(
            f"{source.name} has inputs but no targets", hint="name both, as in x.npy,y.npy or ?target=label"
        )


def _beginning(source: Source) -> Iterator[Batch]:
    """Yield batches in order until enough was looked at."""
    examples = looked_at_bytes = 0
    for batch in source.batches(EpochOrder(_CHECKED_AT_ONCE)):
        yield batch
        examples += num_examples(batch)
        looked_at_bytes += nbytes(batch)
        is_enough = examples >= LOOKED_AT_EXAMPLES and not isinstance(source, IndexedSource)
        if is_enough or looked_at_bytes >= LOOKED_AT_BYTES:
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
