"""The learning task, inferred from outputs and targets in the same way for every framework."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from prunectl.errors import UsageError
from prunectl.formats.base import Array

Shape = Sequence[int | None]
"""A shape without the batch axis; None for an axis of any length."""


IGNORED_LABEL = -100
"""The label that PyTorch's losses ignore; data for `transformers` marks padding and prompts with it."""
_SUM_TOLERANCE = 1e-3
_TINY = 1e-7
"""Added to or clipped from probabilities before a logarithm; below their precision in float32."""


class FinalActivation(StrEnum):
    """The final activation of an output."""

    SOFTMAX = "softmax"
    LOG_SOFTMAX = "log-softmax"
    SIGMOID = "sigmoid"
    RAW = "raw"
    UNKNOWN = ""
    """Not declared: it can only be guessed from the values."""


def activation_of_values(array: Array, axis: int) -> FinalActivation:
    """Guess the final activation from output values, if the graph does not show it; `axis` is that of the classes."""
    values = np.asarray(array, np.float64)
    if not values.size or not np.isfinite(values).all():
        return FinalActivation.RAW
    has_classes = values.ndim > 1 and values.shape[axis] > 1
    if has_classes and values.max() <= 0.0 and _is_one(np.exp(values).sum(axis=axis)):
        return FinalActivation.LOG_SOFTMAX
    if values.min() < 0.0 or values.max() > 1.0:
        return FinalActivation.RAW
    return FinalActivation.SOFTMAX if has_classes and _is_one(values.sum(axis=axis)) else FinalActivation.SIGMOID


def _is_one(sums: Array) -> bool:
    return bool(np.all(np.abs(sums - 1.0) < _SUM_TOLERANCE))


def convert_outputs(array: Array, theirs: FinalActivation, ours: FinalActivation, axis: int) -> Array:
    """Convert outputs from one final activation to another; log-probabilities serve as logits."""
    if theirs is ours or FinalActivation.UNKNOWN in {theirs, ours}:
        return array
    kind, wide = array.dtype, array.astype(np.float64)
    if theirs is FinalActivation.SIGMOID:
        within = np.clip(wide, _TINY, 1.0 - _TINY)
        result = np.log(within) - np.log1p(-within)
    else:
        result = np.log(np.maximum(wide, _TINY)) if theirs is FinalActivation.SOFTMAX else wide
    if ours is FinalActivation.SIGMOID:
        result = 1.0 / (1.0 + np.exp(-result))
    elif ours in {FinalActivation.SOFTMAX, FinalActivation.LOG_SOFTMAX}:
        result = result - result.max(axis=axis, keepdims=True)
        result = result - np.log(np.exp(result).sum(axis=axis, keepdims=True))
        result = np.exp(result) if ours is FinalActivation.SOFTMAX else result
    return result.astype(kind)


class TaskKind(StrEnum):
    """The kind of targets that outputs are compared with."""

    LABELS = "labels"
    """A class index for each example, pixel or token."""
    SHARES = "shares"
    """A probability for each class, such as a one-hot vector."""
    BINARY = "binary"
    """Binary classification: 0 or 1 for each number of the output."""
    NUMBERS = "numbers"
    """Regression: a value for each number of the output."""
    UNKNOWN = ""
    """Targets whose shape fits none of these."""


@dataclass(frozen=True, slots=True)
class Task:
    """The kind of the targets, and for labels the number of classes."""

    kind: TaskKind
    classes: int | None = None

    @property
    def is_classification(self) -> bool:
        """Whether targets are classes, so that cross-entropy and accuracy apply."""
        return self.kind in {TaskKind.LABELS, TaskKind.SHARES, TaskKind.BINARY}


def infer_task(outputs: Shape, activation: FinalActivation, targets: Array, *, is_channels_first: bool = False) -> Task:
    """Infer the task from the targets' values, the shape of an output and its final activation.

    Whole numbers of type float are labels only if the model outputs class probabilities: a loss of the user's own may
    compare several outputs with one measurement. Numbers between 0 and 1 are binary targets if the final activation is
    a sigmoid.
    """
    shape, ends_in_classes = targets.shape[1:], activation in {FinalActivation.SOFTMAX, FinalActivation.LOG_SOFTMAX}
    axis = label_axis(outputs, shape, is_channels_first=is_channels_first)
    if axis is not None:
        is_label = targets.dtype.kind in "iub" or (ends_in_classes and bool((targets == np.trunc(targets)).all()))
        return Task(TaskKind.LABELS, outputs[axis - 1]) if is_label else Task(TaskKind.UNKNOWN)
    if not has_same_size(outputs, shape):
        return Task(TaskKind.UNKNOWN)
    is_share = bool(((targets >= 0) & (targets <= 1)).all())
    # Regression targets may all be zero in the first batch.
    is_bit = (
        is_share
        and bool(((targets == 0) | (targets == 1)).all())
        and (targets.dtype.kind != "f" or targets.min() != targets.max())
    )
    has_classes = 1 < targets.ndim == len(outputs) + 1 and activation is not FinalActivation.SIGMOID
    if is_share and has_classes and (is_bit or ends_in_classes):
        axis = 1 if is_channels_first else targets.ndim - 1
        if outputs[axis - 1] != 1 and _is_one(targets.sum(axis=axis)):
            return Task(TaskKind.SHARES)
    if is_bit or (is_share and activation is FinalActivation.SIGMOID):
        return Task(TaskKind.BINARY)
    return Task(TaskKind.NUMBERS)


def label_axis(outputs: Shape, targets: Shape, *, is_channels_first: bool) -> int | None:
    """The class axis of outputs, counting the batch axis, if the targets are a class index for each position."""
    last = len(outputs)
    # In PyTorch classes are on axis 1, but on the last axis for one vector of outputs per token.
    axes = [last] if not is_channels_first or last == 1 else [last, 1] if last == 2 else [1, last]
    for axis in axes if outputs else ():
        before, after = outputs[: axis - 1], outputs[axis:]
        if outputs[axis - 1] != 1 and any(shape_matches(targets, (*before, *own, *after)) for own in ((), (1,))):
            return axis
    return None


def has_same_size(outputs: Shape, targets: Shape) -> bool:
    """Whether targets have as many numbers as an output."""
    if None in outputs:
        return shape_matches(targets, outputs)
    return math.prod(size or 0 for size in outputs) == math.prod(size or 0 for size in targets)


def shape_matches(shape: Shape, expected: Shape) -> bool:
    """Whether a shape equals the expected one, in which None stands for any length."""
    return len(shape) == len(expected) and all(
        length is None or length == size for size, length in zip(shape, expected, strict=True)
    )


def format_shape(shape: Shape, scalar: str = "a single number") -> str:
    """Format a shape as users write it."""
    return "x".join("?" if length is None else str(length) for length in shape) or scalar


def target_mismatch(targets: Shape, outputs: Shape, of: str) -> UsageError:
    """The error for targets whose size differs from that of the outputs, so that no loss can compare them."""
    target, output = (format_shape(shape, "a number") for shape in (targets, outputs))
    return UsageError(
        f"a target is {target} for each example, and {of} {output}",
        hint="choose other targets (train.npz[x,y]), or a --loss for these shapes",
    )


@dataclass(frozen=True, slots=True)
class DistilledOutput:
    """How an output is compared with the teacher's: as classes, as binary classification, or as numbers."""

    is_classification: bool
    is_binary: bool
    activation: FinalActivation
    axis: int = -1
    """The class axis."""


def output_axis(ndim: int, *, is_channels_first: bool) -> int:
    """The class axis of an output; in every framework it is the last one for one vector of outputs per token."""
    return 1 if is_channels_first and ndim != 3 and ndim > 1 else -1


def compare_outputs(
    dense: Array, pruned: Array, activation: FinalActivation, axis: int, loss: str = "", *, is_binary: bool = False
) -> DistilledOutput:
    """How to compare an output with that of the dense model: as classes if it has them, else as numbers.

    The final activation may have been guessed from the dense model's outputs, so the pruned model's are checked too:
    logarithms are taken of them. Raw outputs are logits if they look like logits or the user asks for `kl`; for `mse`
    they are numbers. They are binary logits if the user asks for `bce`, or if the file was trained so (`is_binary`).
    """
    numbers = DistilledOutput(False, False, FinalActivation.RAW, axis)
    if loss == "mse":
        return numbers
    if loss and loss not in COMPARING_LOSSES:
        raise UsageError(
            f"outputs cannot be compared by the loss {loss}", hint="use --loss kl, --loss bce or --loss mse"
        )
    apparent = activation_of_values(pruned, axis)
    is_share = activation is FinalActivation.SIGMOID and apparent is not FinalActivation.RAW
    if is_share or (activation in {FinalActivation.SOFTMAX, FinalActivation.LOG_SOFTMAX} and apparent is activation):
        return DistilledOutput(True, is_share, activation, axis)
    # A single number is not a distribution over classes.
    is_single = dense.ndim < 2 or dense.shape[axis] == 1
    if loss == "bce" or (is_binary and not loss) or (loss and is_single):
        return DistilledOutput(True, True, FinalActivation.RAW, axis)
    return DistilledOutput(True, False, FinalActivation.RAW, axis) if loss or are_logits(dense, axis) else numbers


COMPARING_LOSSES = frozenset({"kl", "cross-entropy", "bce", "mse"})
"""The losses by which a user may have outputs compared with those of a teacher."""
_SURE, _SURE_OF_TWO = 0.5, 0.8
"""Minimum mean probability of the most likely class in logits: for several classes, and for two."""
_MOST_FREQUENT = 0.9
"""Maximum share of outputs with the same most likely class."""


def are_logits(outputs: Array, axis: int) -> bool:
    """Whether raw outputs look like a trained classifier's: confident, and not always of the same class."""
    values = np.asarray(outputs, np.float64)
    if values.ndim < 2 or values.shape[axis] < 2 or len(values) < 2:
        return False
    shifted = np.exp(values - values.max(axis=axis, keepdims=True))
    likeliest = shifted.max(axis=axis) / shifted.sum(axis=axis)
    frequent = np.bincount(values.argmax(axis=axis).reshape(-1)).max() / likeliest.size
    return bool(likeliest.mean() >= (_SURE_OF_TWO if values.shape[axis] == 2 else _SURE) and frequent <= _MOST_FREQUENT)


def distillation_loss(ops: Any, output: DistilledOutput, teacher: Any, student: Any, temperature: float) -> Any:
    """T^2 KL(teacher at T || student at T) (Hinton et al. 2015), or the squared error of numbers.

    `ops` provides a framework's operations under the names of `keras.ops`. The teacher's outputs must have the
    student's final activation.
    """
    teacher, student = ops.cast(teacher, "float32"), ops.cast(student, "float32")
    if not output.is_classification:
        return ops.mean(ops.square(teacher - student))
    teacher, student = (_logits(ops, output.activation, outputs) / temperature for outputs in (teacher, student))
    if output.is_binary or output.activation is FinalActivation.SIGMOID or student.shape[output.axis] == 1:
        p = ops.sigmoid(teacher)
        positive = p * (ops.log_sigmoid(teacher) - ops.log_sigmoid(student))
        divergence = positive + (1.0 - p) * (ops.log_sigmoid(-teacher) - ops.log_sigmoid(-student))
    else:
        teacher, student = (ops.log_softmax(logits, output.axis) for logits in (teacher, student))
        divergence = ops.sum(ops.exp(teacher) * (teacher - student), axis=output.axis)
    return temperature**2 * ops.mean(divergence)


def _logits(ops: Any, activation: FinalActivation, outputs: Any) -> Any:
    """Logits of probabilities; unlike a maximum, the added constant keeps both values and gradients useful at 0."""
    if activation is FinalActivation.SOFTMAX:
        return ops.log(outputs + _TINY)
    if activation is FinalActivation.SIGMOID:
        return ops.log(outputs + _TINY) - ops.log(1.0 - outputs + _TINY)
    return outputs
