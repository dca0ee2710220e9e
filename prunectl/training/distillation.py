"""A teacher (Hinton et al. 2015): any file that some runtime can run, which answers as its pupil would.

It may be of another framework than its pupil. Then images have their channels at the other end, numbers are of another
type, and classes come as logits here and as probabilities there: all of this is put right on the way.
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
class _Answer:
    """How one output of the teacher becomes one of the pupil's."""

    layout: AxisChange | None
    theirs: FinalActivation
    ours: FinalActivation
    axis: int

    def apply(self, array: Array) -> Array:
        """The output as the pupil would give it."""
        shaped = self.layout.apply(array) if self.layout else array
        return convert_outputs(shaped, self.theirs, self.ours, self.axis)


@dataclass(frozen=True, slots=True)
class Teacher:
    """Answers for a batch of its pupil."""

    predict: Callable[[Arrays], Arrays]
    close: Callable[[], None]
    notes: tuple[str, ...]
    _inputs: Sequence[ArrayAdapter]
    _outputs: Sequence[_Answer]

    def __call__(self, x: Arrays) -> Arrays:
        """What the teacher makes of inputs, as its pupil would give it."""
        outputs = as_tuple(self.predict(adapt.apply_each(self._inputs, x)))
        answers = [answer.apply(array) for answer, array in zip(self._outputs, outputs, strict=False)]
        return tuple(answers) if len(answers) > 1 else answers[0]


def load_teacher(
    path: Path, origin: LoadOptions, device: str, pupil: ModelSignature, example: Batch, *, builder: str = ""
) -> Teacher:
    """A model that answers for the batches of a pupil, of which one example is given.

    The origin is the pupil's; the builder is the teacher's own.
    """
    model = open_model(path)
    origin = replace(teacher_load_options(model, origin, builder), arrays=tuple(port.name for port in pupil.inputs))
    predict, close, theirs = _opened(model, origin, device)
    predict, theirs = _in_order_of(pupil, theirs, predict)
    try:
        inputs = _input_fits(path, theirs, pupil, as_tuple(example.x))
        answers = [np.asarray(array) for array in as_tuple(predict(adapt.apply_each(inputs, example.x)))]
        outputs = _answers(path, answers, theirs, pupil)
    except BaseException:
        close()
        raise
    notes = tuple(note for fit in inputs for note in fit.notes)
    if len(answers) > len(outputs):
        notes += (f"{path} has {len(answers)} outputs: the first {len(outputs)} are used for distillation.",)
    return Teacher(predict, close, notes, inputs, outputs)


def _in_order_of(
    pupil: ModelSignature, theirs: ModelSignature, predict: Callable[[Arrays], Arrays]
) -> tuple[Callable[[Arrays], Arrays], ModelSignature]:
    """A teacher whose inputs and outputs stand where the pupil has those of their names."""
    inputs, outputs = _order(theirs.inputs, pupil.inputs), _order(theirs.outputs, pupil.outputs)
    if inputs == sorted(inputs) and outputs == sorted(outputs):
        return predict, theirs

    def answer(x: Arrays) -> Arrays:
        arrays = as_tuple(x)
        taken = tuple(arrays[inputs.index(index)] for index in range(len(inputs))) if len(arrays) > 1 else arrays
        made = as_tuple(predict(taken if len(taken) > 1 else taken[0]))
        # A model may have outputs that it does not declare.
        ordered = tuple(made[index] for index in outputs) + made[len(outputs) :]
        return ordered if len(ordered) > 1 else ordered[0]

    ports = (tuple(theirs.inputs[index] for index in inputs), tuple(theirs.outputs[index] for index in outputs))
    return answer, replace(theirs, inputs=ports[0], outputs=ports[1])


def _order(theirs: Sequence[TensorSpec], pupil: Sequence[TensorSpec]) -> list[int]:
    """The numbers of a teacher's ports, those first that the pupil has too, if it has no others."""
    names = [port.name for port in theirs]
    if not {port.name for port in pupil} <= set(names):
        return list(range(len(names)))
    first = [names.index(port.name) for port in pupil]
    return first + [index for index in range(len(names)) if index not in first]


def compare_answers(
    teacher: Arrays, student: Arrays, signature: ModelSignature, loss: str
) -> tuple[tuple[DistilledOutput, ...], str]:
    """How each output is compared with a teacher's where no target tells, and a sentence that says so."""
    ports = (*signature.outputs, *(TensorSpec("", None, ""),) * len(as_tuple(teacher)))
    compared = tuple(
        compare_outputs(
            theirs,
            ours,
            port.ending,
            output_axis(theirs.ndim, is_channels_first=signature.is_channels_first),
            loss,
            is_binary=port.is_binary,
        )
        for theirs, ours, port in zip(as_tuple(teacher), as_tuple(student), ports, strict=False)
    )
    kinds = dict.fromkeys(map(_kind, compared))
    other = "mse" if compared[0].is_classification else "kl"
    return compared, f"Outputs were compared as {' and '.join(kinds)}. If that is wrong, add --loss {other}."


def _kind(output: DistilledOutput) -> str:
    if output.is_classification and output.is_binary:
        return "yes or no (binary cross-entropy)"
    return "classes (KL divergence)" if output.is_classification else "numbers (squared error)"


def teacher_load_options(model: ModelFile, pupil: LoadOptions, builder: str) -> LoadOptions:
    """How a teacher becomes a network: by its own builder, else by the pupil's if it holds weights alone."""
    return replace(pupil, model=builder or ("" if _is_complete(model) else pupil.model))


def _opened(
    model: ModelFile, origin: LoadOptions, device: str
) -> tuple[Callable[[Arrays], Arrays], Callable[[], None], ModelSignature]:
    predictor = load_predictor(model, origin)
    if predictor is not None:
        return predictor.predict, _nothing, predictor.signature
    network = load_trainable(model, origin)
    network.place(device)
    return network.predict, network.close, network.signature


def _nothing() -> None:
    """A runtime lets go of a model with the last reference to it."""


def _is_complete(model: ModelFile) -> bool:
    """Whether a file says how its weights are connected: then what builds the pupil has nothing to do with it."""
    if model.family in {Family.TORCH_PROGRAM, Family.SAVED_MODEL} or model.about.keras is not None:
        return True
    return user_code.is_script(model)


def _input_fits(
    path: Path, theirs: ModelSignature, pupil: ModelSignature, arrays: Sequence[Array]
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
        if port.shape is None and theirs.is_channels_first != pupil.is_channels_first:
            change = _by_convention(shape, is_first=theirs.is_channels_first)
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


def _by_convention(shape: tuple[int, ...], *, is_first: bool) -> AxisChange | None:
    """What brings the channels of an image to the other end, for a teacher that does not say what it takes."""
    if len(shape) != 3 or shape[-1 if is_first else 0] not in _COLOURS:
        return None
    axes = (2, 0, 1) if is_first else (1, 2, 0)
    ends = "first" if is_first else "last"
    return AxisChange(
        f"{format_shape(shape)} is transposed to {format_shape([shape[axis] for axis in axes])} (channels {ends})",
        order=axes,
    )


def _answers(path: Path, seen: Sequence[Array], theirs: ModelSignature, pupil: ModelSignature) -> list[_Answer]:
    if len(seen) < len(pupil.outputs):
        raise UsageError(f"the teacher {path} has {len(seen)} outputs, the model {len(pupil.outputs)}")
    ports = theirs.outputs if len(theirs.outputs) == len(seen) else (TensorSpec("", None, ""),) * len(seen)
    axis, their_axis = (1 if signature.is_channels_first else -1 for signature in (pupil, theirs))
    answers = []
    for array, port, mine in zip(seen, ports, pupil.outputs, strict=False):
        shape = array.shape[1:]
        change = adapt.find_axis_change(shape, mine.shape)
        if mine.shape is not None and change is None and not shape_matches(shape, mine.shape):
            raise UsageError(
                f"the teacher {path} outputs {format_shape(shape)} for each example, "
                f"but the model outputs {format_shape(mine.shape)}",
                hint="the teacher must have the same classes, in the same order",
            )
        # A matrix has its classes in one place only.
        ending = port.ending or activation_of_values(array, their_axis if array.ndim > 2 else -1)
        answers.append(_Answer(change, ending, mine.ending, axis))
    return answers
