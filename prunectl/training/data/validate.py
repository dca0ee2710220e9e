"""Whether a model can learn from a source, told before the first step."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from prunectl.errors import InputError, UsageError
from prunectl.formats.base import Array
from prunectl.training.backend import ModelSignature
from prunectl.training.data.adapt import array_name, format_shape, shape_matches
from prunectl.training.data.batching import nbytes, num_examples
from prunectl.training.data.readers import NUMERIC, IndexedSource
from prunectl.training.data.source import Arrays, Batch, EpochOrder, Source, as_tuple

Shape = tuple[int | None, ...]


def check_labels(y: Array, classes: int, output: Shape | None, *, what: str, begin: int) -> None:
    """Refuse targets that are neither labels from 0 to classes - 1 nor a number for each class."""
    if _is_for_each_class(y, classes, output):
        return
    if not _is_for_each_example(y, output):
        given, wanted = format_shape(y.shape[1:]), format_shape(output or (classes,))
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
    return output is None or shape_matches(y.shape[1:], output)


def _is_for_each_example(y: Array, output: Shape | None) -> bool:
    """Whether there is a label wherever the model answers: for each example, pixel or word."""
    if output is None:
        return True
    inner = output[:-1]
    return shape_matches(y.shape[1:], inner) or shape_matches(y.shape[1:], (*inner, 1))


LOOKED_AT_BYTES = 256 << 20
LOOKED_AT_EXAMPLES = 2048
"""Of a stream, which may be endless and slow."""
_BATCH = 256


def check_batches(
    source: Source, signature: ModelSignature, *, needs_targets: bool, classes: int | None
) -> tuple[str, ...]:
    """What the user should know of a source that fits a model; refuse one that does not."""
    if needs_targets:
        require_targets(source)
    seen = 0
    for batch in _beginning(source):
        _check_inputs(source, batch, signature, seen)
        if batch.y is not None:
            _check_targets(source, batch.y, signature, classes, seen)
        seen += num_examples(batch)
    if not seen:
        raise InputError(f"{source.name} has no examples", hint="do its options leave any?")
    begin = 0
    for targets in source.labels():
        _check_targets(source, targets, signature, classes, begin)
        begin += len(as_tuple(targets)[0])
    return _notes(source, seen, are_labels_seen=begin > 0)


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
    for place, (array, port) in enumerate(zip(inputs, signature.inputs, strict=True)):
        what = array_name(source, "x", place, len(inputs))
        _check_numbers(array, what, begin)
        if port.shape is not None and not shape_matches(array.shape[1:], port.shape):
            raise UsageError(
                f"{what} is {format_shape(array.shape[1:])} for each example, "
                f"and the input {port.name!r} of the model is {format_shape(port.shape)}",
                hint="?shape=1x28x28 reads the same numbers in another shape, ?flatten=1 as one row",
            )
        if port.dtype.startswith(("int", "uint")) and array.dtype.kind == "f":
            raise UsageError(f"{what} is {array.dtype}, and the input {port.name!r} of the model is {port.dtype}")


def _check_targets(source: Source, y: Arrays, signature: ModelSignature, classes: int | None, begin: int) -> None:
    targets = as_tuple(y)
    if isinstance(y, tuple) and signature.outputs and len(y) != len(signature.outputs):
        raise UsageError(f"{source.name} has {len(y)} targets, and the model has {len(signature.outputs)} outputs")
    for place, array in enumerate(targets):
        _check_numbers(array, array_name(source, "y", place, len(targets)), begin)
    if classes is not None and not isinstance(y, tuple):
        shape = signature.outputs[0].shape if signature.outputs else None
        check_labels(y, classes, shape, what=array_name(source, "y", 0, 1), begin=begin)


def _check_numbers(array: Array, what: str, begin: int) -> None:
    if array.dtype.kind not in NUMERIC:
        raise InputError(f"{what} consists of {array.dtype}, and not of numbers")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        wrong = np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(axis=1))
        raise InputError(
            f"{what} holds numbers that are not finite (NaN or infinity), first in example {begin + wrong[0]}",
            hint="mend or leave out such examples: one of them makes every weight NaN",
        )


def _notes(source: Source, seen: int, *, are_labels_seen: bool) -> tuple[str, ...]:
    if source.count == seen:
        return ()
    of = "" if source.count is None else f" of {source.count:,}"
    but = ", and all labels" if are_labels_seen else ""
    return (f"{source.name}: the first {seen:,}{of} examples were checked{but}",)
