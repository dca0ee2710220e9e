"""Knowledge distillation (Hinton et al. 2015): a teacher from any file that can be run, adapted to its student.

Teacher and student may be of different frameworks. Then the teacher's inputs and outputs are converted: channels first
or last, data types, and logits or probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from prunectl.errors import UsageError
from prunectl.formats.base import Array, Family, ModelFile
from prunectl.formats.registry import open_model
from prunectl.training import user_code
from prunectl.training.backend import LoadOptions, ModelSignature, TensorSpec
from prunectl.training.data import adapt
from prunectl.training.data.adapt import ArrayAdapter, AxisChange
from prunectl.training.data.source import Arrays, Batch, as_tuple
from prunectl.training.runtimes import load_predictor, load_trainable
from prunectl.training.task import (
    DistilledOutput,
    FinalActivation,
    activation_of_values,
    compare_outputs,
    convert_outputs,
    format_shape,
    output_axis,
    shape_matches,
)

_COLOURS = frozenset({1, 3, 4})


@dataclass(frozen=True, slots=True)
class _Adapter:
    """Converts one output of the teacher to that of the student."""

    layout: AxisChange | None
    theirs: FinalActivation
    ours: FinalActivation
    axis: int

    def apply(self, array: Array) -> Array:
        """The output in the student's layout and with its final activation."""
        shaped = self.layout.apply(array) if self.layout else array
        return convert_outputs(shaped, self.theirs, self.ours, self.axis)


@dataclass(frozen=True, slots=True)
class Teacher:
    """A model whose outputs for a batch are the targets of its student."""

    predict: Callable[[Arrays], Arrays]
    close: Callable[[], None]
    notes: tuple[str, ...]
    _inputs: Sequence[ArrayAdapter]
    _outputs: Sequence[_Adapter]

    def __call__(self, x: Arrays) -> Arrays:
        """The teacher's outputs for a batch of the student, in the student's form."""
        outputs = as_tuple(self.predict(adapt.apply_each(self._inputs, x)))
        converted = [adapter.apply(array) for adapter, array in zip(self._outputs, outputs, strict=False)]
        return tuple(converted) if len(converted) > 1 else converted[0]


def load_teacher(
    path: Path, origin: LoadOptions, device: str, student: ModelSignature, example: Batch, *, builder: str = ""
) -> Teacher:
    """Load a teacher for a student, and fit it to an example batch of the student.

    `origin` holds the student's load options; `builder` is the teacher's own.
    """
    model = open_model(path)
    origin = replace(teacher_load_options(model, origin, builder), arrays=tuple(port.name for port in student.inputs))
    predict, close, theirs = _open(model, origin, device)
    predict, theirs = _in_order_of(student, theirs, predict)
    try:
        inputs = _fit_inputs(path, theirs, student, as_tuple(example.x))
        example_outputs = [np.asarray(array) for array in as_tuple(predict(adapt.apply_each(inputs, example.x)))]
        outputs = _fit_outputs(path, example_outputs, theirs, student)
    except BaseException:
        close()
        raise
    notes = tuple(note for fit in inputs for note in fit.notes)
    if len(example_outputs) > len(outputs):
        notes += (f"{path} has {len(example_outputs)} outputs: the first {len(outputs)} are used for distillation.",)
    return Teacher(predict, close, notes, inputs, outputs)


def _in_order_of(
    student: ModelSignature, theirs: ModelSignature, predict: Callable[[Arrays], Arrays]
) -> tuple[Callable[[Arrays], Arrays], ModelSignature]:
    """Reorder the teacher's inputs and outputs to match the student's by name."""
    inputs, outputs = _order(theirs.inputs, student.inputs), _order(theirs.outputs, student.outputs)
    if inputs == sorted(inputs) and outputs == sorted(outputs):
        return predict, theirs

    def answer(x: Arrays) -> Arrays:
        arrays = as_tuple(x)
        reordered = tuple(arrays[inputs.index(index)] for index in range(len(inputs))) if len(arrays) > 1 else arrays
        results = as_tuple(predict(reordered if len(reordered) > 1 else reordered[0]))
        # A model may have outputs that it does not declare.
        ordered = tuple(results[index] for index in outputs) + results[len(outputs) :]
        return ordered if len(ordered) > 1 else ordered[0]

    ports = (tuple(theirs.inputs[index] for index in inputs), tuple(theirs.outputs[index] for index in outputs))
    return answer, replace(theirs, inputs=ports[0], outputs=ports[1])


def _order(theirs: Sequence[TensorSpec], student: Sequence[TensorSpec]) -> list[int]:
    """Indices of the teacher's ports, the student's first; in the given order if a port of the student is missing."""
    names = [port.name for port in theirs]
    if not {port.name for port in student} <= set(names):
        return list(range(len(names)))
    first = [names.index(port.name) for port in student]
    return first + [index for index in range(len(names)) if index not in first]


def compare_answers(
    teacher: Arrays, student: Arrays, signature: ModelSignature, loss: str
) -> tuple[tuple[DistilledOutput, ...], str]:
    """How to compare each output with the teacher's if there are no targets, and a note on the choice for the user."""
    ports = (*signature.outputs, *(TensorSpec("", None, ""),) * len(as_tuple(teacher)))
    compared = tuple(
        compare_outputs(
            theirs,
            ours,
            port.activation,
            output_axis(theirs.ndim, is_channels_first=signature.is_channels_first),
            loss,
            is_binary=port.is_binary,
        )
        for theirs, ours, port in zip(as_tuple(teacher), as_tuple(student), ports, strict=False)
    )
    kinds = dict.fromkeys(map(_describe, compared))
    other = "mse" if compared[0].is_classification else "kl"
    return compared, f"Outputs were compared as {' and '.join(kinds)}. If that is wrong, add --loss {other}."


def _describe(output: DistilledOutput) -> str:
    if output.is_classification and output.is_binary:
        return "yes or no (binary cross-entropy)"
    return "classes (KL divergence)" if output.is_classification else "numbers (squared error)"


def teacher_load_options(model: ModelFile, student: LoadOptions, builder: str) -> LoadOptions:
    """Load options of the teacher: its own builder, or the student's if the teacher's file holds only weights."""
    return replace(student, model=builder or ("" if _is_complete(model) else student.model))


def _open(
    model: ModelFile, origin: LoadOptions, device: str
) -> tuple[Callable[[Arrays], Arrays], Callable[[], None], ModelSignature]:
    predictor = load_predictor(model, origin)
    if predictor is not None:
        return predictor.predict, _close_nothing, predictor.signature
    network = load_trainable(model, origin)
    network.place(device)
    return network.predict, network.close, network.signature


def _close_nothing() -> None:
    """Close nothing: a runtime frees its model with the last reference to it."""


def _is_complete(model: ModelFile) -> bool:
    """Whether the file holds the architecture too, so that the student's builder must not be used for it."""
    if model.family in {Family.TORCH_PROGRAM, Family.SAVED_MODEL} or model.about.keras is not None:
        return True
    return user_code.is_script(model)


def _fit_inputs(
    path: Path, theirs: ModelSignature, student: ModelSignature, arrays: Sequence[Array]
) -> list[ArrayAdapter]:
    if len(theirs.inputs) != len(arrays):
        raise UsageError(
            f"the teacher {path} has {len(theirs.inputs)} inputs, the model {len(arrays)}",
            hint="the teacher must have the same inputs as the model, in the same order",
        )
    adapters = []
    for port, array in zip(theirs.inputs, arrays, strict=True):
        shape = array.shape[1:]
        change = adapt.find_axis_change(shape, port.shape)
        if port.shape is None and theirs.is_channels_first != student.is_channels_first:
            change = _transpose_image(shape, is_first=theirs.is_channels_first)
        elif port.shape is not None and change is None and not shape_matches(shape, port.shape):
            raise UsageError(
                f"the teacher {path} takes {format_shape(port.shape)} for each example, "
                f"but the model takes {format_shape(shape)}",
                hint="the teacher must have the same inputs as the model; only the channel axis may differ",
            )
        adapters.append(
            ArrayAdapter(f"the input of the teacher {path.name}", change, adapt.input_cast(array.dtype, port.dtype))
        )
    return adapters


def _transpose_image(shape: tuple[int, ...], *, is_first: bool) -> AxisChange | None:
    """Transpose images between CHW and HWC, for a teacher that does not declare its input shape."""
    if len(shape) != 3 or shape[-1 if is_first else 0] not in _COLOURS:
        return None
    axes = (2, 0, 1) if is_first else (1, 2, 0)
    ends = "first" if is_first else "last"
    return AxisChange(
        f"{format_shape(shape)} is transposed to {format_shape([shape[axis] for axis in axes])} (channels {ends})",
        order=axes,
    )


def _fit_outputs(path: Path, seen: Sequence[Array], theirs: ModelSignature, student: ModelSignature) -> list[_Adapter]:
    if len(seen) < len(student.outputs):
        raise UsageError(f"the teacher {path} has {len(seen)} outputs, the model {len(student.outputs)}")
    ports = theirs.outputs if len(theirs.outputs) == len(seen) else (TensorSpec("", None, ""),) * len(seen)
    axis, their_axis = (1 if signature.is_channels_first else -1 for signature in (student, theirs))
    adapters = []
    for array, port, mine in zip(seen, ports, student.outputs, strict=False):
        shape = array.shape[1:]
        change = adapt.find_axis_change(shape, mine.shape)
        if mine.shape is not None and change is None and not shape_matches(shape, mine.shape):
            raise UsageError(
                f"the teacher {path} outputs {format_shape(shape)} for each example, "
                f"but the model outputs {format_shape(mine.shape)}",
                hint="the teacher must have the same classes, in the same order",
            )
        # A 2-D output has its classes on the last axis in every framework.
        activation = port.activation or activation_of_values(array, their_axis if array.ndim > 2 else -1)
        adapters.append(_Adapter(change, activation, mine.activation, axis))
    return adapters
