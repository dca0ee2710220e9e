"""Whether a model can learn from a source, checked before the first step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from prunectl.errors import InputError, UsageError
from prunectl.formats.base import Array
from prunectl.training.backend import ModelSignature
from prunectl.training.data.adapt import array_name, format_shape
from prunectl.training.data.batching import nbytes, num_examples
from prunectl.training.data.readers import NUMERIC, IndexedSource
from prunectl.training.data.source import Arrays, Batch, EpochOrder, Source, as_tuple
from prunectl.training.task import Task, TaskKind, infer_task, label_axis, shape_matches


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
                f"{what} is {format_shape(array.shape[1:])} for each example, "
                f"and the output of the model is {format_shape(output.shape)}",
                hint="targets are one label, or a number for each class (?onehot makes these)",
            )
        _check_range(array, task.classes, what, begin)


def _check_range(y: Array, classes: int, what: str, begin: int) -> None:
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


LOOKED_AT_BYTES = 256 << 20
LOOKED_AT_EXAMPLES = 2048
"""Of a stream, which may be endless and slow."""
_BATCH = 256


def check_batches(
    source: Source, signature: ModelSignature, *, needs_targets: bool, tasks: Sequence[Task] = ()
) -> tuple[str, ...]:
    """What the user should know of a source that fits a model; refuse one that does not."""
    if needs_targets:
        require_targets(source)
    checked = 0
    for batch in _beginning(source):
        _check_inputs(source, batch, signature, checked)
        if batch.y is not None:
            _check_targets(source, batch.y, signature, tasks, checked)
        checked += num_examples(batch)
    if not checked:
        raise InputError(f"{source.name} has no examples", hint="do its options leave any?")
    begin = 0
    for targets in source.labels():
        _check_targets(source, targets, signature, tasks, begin)
        begin += len(as_tuple(targets)[0])
    return _notes(source, checked, are_labels_seen=begin > 0)


def require_targets(source: Source) -> None:
    """Refuse examples that do not say what the model should answer."""
    if not source.has_targets:
        raise UsageError(
            f"{source.name} has inputs and no targets", hint="name both, as in x.npy,y.npy or ?target=label"
        )


def _beginning(source: Source) -> Iterator[Batch]:
    """Yield batches in order until enough was looked at."""
    examples = looked_at_bytes = 0
    for batch in source.batches(EpochOrder(_BATCH)):
        yield batch
        examples += num_examples(batch)
        looked_at_bytes += nbytes(batch)
        is_enough = examples >= LOOKED_AT_EXAMPLES and not isinstance(source, IndexedSource)
        if is_enough or looked_at_bytes >= LOOKED_AT_BYTES:
            return


def _check_inputs(source: Source, batch: Batch, signature: ModelSignature, begin: int) -> None:
    inputs = as_tuple(batch.x)
    if len(inputs) != len(signature.inputs):
        raise UsageError(f"{source.name} has {len(inputs)} inputs, and the model has {len(signature.inputs)}")
    for index, (array, port) in enumerate(zip(inputs, signature.inputs, strict=True)):
        what = array_name(source.name, "x", index, len(inputs))
        _check_numbers(array, what, begin)
        if port.shape is not None and not shape_matches(array.shape[1:], port.shape):
            raise UsageError(
                f"{what} is {format_shape(array.shape[1:])} for each example, "
                f"and the input {port.name!r} of the model is {format_shape(port.shape)}",
                hint="?shape=1x28x28 reads the same numbers in another shape, ?flatten=1 as one row",
            )
        if port.dtype.startswith(("int", "uint")) and array.dtype.kind == "f":
            raise UsageError(f"{what} is {array.dtype}, and the input {port.name!r} of the model is {port.dtype}")


def _check_targets(source: Source, y: Arrays, signature: ModelSignature, tasks: Sequence[Task], begin: int) -> None:
    targets = as_tuple(y)
    if isinstance(y, tuple) and signature.outputs and len(y) != len(signature.outputs):
        raise UsageError(f"{source.name} has {len(y)} targets, and the model has {len(signature.outputs)} outputs")
    for index, array in enumerate(targets):
        _check_numbers(array, array_name(source.name, "y", index, len(targets)), begin)
    check_labels(y, tasks, signature, name=source.name, begin=begin)


def _check_numbers(array: Array, what: str, begin: int) -> None:
    if array.dtype.kind not in NUMERIC:
        raise InputError(f"{what} consists of {array.dtype}, and not of numbers")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        wrong = np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(axis=1))
        raise InputError(
            f"{what} holds numbers that are not finite (NaN or infinity), first in example {begin + wrong[0]}",
            hint="mend or leave out such examples: one of them makes every weight NaN",
        )


def _notes(source: Source, checked: int, *, are_labels_seen: bool) -> tuple[str, ...]:
    if source.count == checked:
        return ()
    of = "" if source.count is None else f" of {source.count:,}"
    but = ", and all labels" if are_labels_seen else ""
    return (f"{source.name}: the first {checked:,}{of} examples were checked{but}",)
