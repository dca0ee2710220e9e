"""What a converter works on: the source, its runtime, and sample inputs (from data, or random)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.calibration.session import load_inputs, padded_batch_rows
from prunectl.errors import UsageError
from prunectl.exporting.inputs import InputSpec, RunnableModel, shape_text, signature_of
from prunectl.exporting.request import BATCH_SIZE, SAMPLES, ExportRequest
from prunectl.formats.base import Array, ModelFile
from prunectl.training.data.source import EpochOrder

_IMAGE_LENGTH, _SEQUENCE_LENGTH = 224, 128
_OPEN_LENGTH = 16
"""Sample length of an axis that the user leaves open."""


@dataclass(frozen=True, slots=True)
class Samples:
    """Batches of inputs to run a model on."""

    batches: tuple[tuple[Array, ...], ...]
    is_data: bool
    """Whether they come from `--data`; else they are random."""
    notes: tuple[str, ...] = ()

    @property
    def examples(self) -> int:
        """Number of examples in all batches."""
        return sum(len(batch[0]) for batch in self.batches)


NO_SAMPLES = Samples((), is_data=False)


def make_samples(runnable: RunnableModel, inputs: tuple[InputSpec, ...], request: ExportRequest) -> Samples:
    """Sample inputs for a model: from `--data`, or random."""
    fixed_size = _fixed_batch_size(inputs)
    batch_size = fixed_size or request.batch_size or BATCH_SIZE
    if request.data:
        arrays, notes = _data_samples(runnable, inputs, request)
    else:
        # One more than a batch: the last goes through alone, which a fixed batch would not take.
        arrays, notes = (
            _random_arrays(inputs, request.samples or batch_size + (fixed_size is None), request.seed or 0),
            (),
        )
    return Samples(_batches(arrays, batch_size, is_fixed=fixed_size is not None), bool(request.data), notes)


def _fixed_batch_size(inputs: tuple[InputSpec, ...]) -> int | None:
    """The batch size that a model was saved for, if it has a fixed one."""
    return next((spec.shape[0] for spec in inputs if spec.shape), None)


def _data_samples(
    runnable: RunnableModel, inputs: tuple[InputSpec, ...], request: ExportRequest
) -> tuple[tuple[Array, ...], tuple[str, ...]]:
    signature = signature_of(inputs, is_channels_first=runnable.is_channels_first)
    order = EpochOrder(request.batch_size or BATCH_SIZE, request.seed or 0, is_shuffled=False)
    return load_inputs(request.data, signature, request.samples or SAMPLES, order)


def _random_arrays(inputs: tuple[InputSpec, ...], count: int, seed: int) -> tuple[Array, ...]:
    random = np.random.default_rng(seed)
    return tuple(_random_array(random, (count, *_example_shape(spec)), spec.dtype) for spec in inputs)


def _example_shape(spec: InputSpec) -> tuple[int, ...]:
    if spec.shape is None:
        raise UsageError(
            f"the model does not say the shape of its input {spec.name}",
            hint=f"--input {spec.name}:1,3,224,224 says it; or --data SPEC",
        )
    return tuple(_OPEN_LENGTH if length is None else length for length in spec.shape[1:])


def check_known(inputs: tuple[InputSpec, ...], request: ExportRequest) -> None:
    """Refuse open axes that neither `--input` nor `--data` closes: no sample could be made."""
    for spec in inputs:
        if request.data or request.input or (spec.shape is not None and None not in spec.shape[1:]):
            continue
        raise UsageError(
            f"the input {spec.name} of the model is {shape_text(spec.shape)}: it does not say how long each axis is",
            hint=f"--input {spec.name}:{_shape_hint(spec)} says it (? leaves an axis open); or --data SPEC",
        )


def _shape_hint(spec: InputSpec) -> str:
    """A plausible shape for a hint: open axes get the usual length of images or sequences."""
    if spec.shape is None:
        return "1,3,224,224"
    open_length = _IMAGE_LENGTH if len(spec.shape) > 3 else _SEQUENCE_LENGTH
    batch, *others = spec.shape
    return ",".join(map(str, (batch or 1, *(length or open_length for length in others))))


def _random_array(random: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    if dtype.startswith(("int", "uint", "bool")):
        # What these numbers count is unknown; 0 and 1 are within every vocabulary.
        return random.integers(0, 2, shape).astype(dtype)
    if dtype and not dtype.startswith("float"):
        raise UsageError(f"the model takes {dtype}, and no such inputs can be made up", hint="--data SPEC")
    return random.standard_normal(shape, np.float32).astype(dtype or "float32")


def _batches(arrays: tuple[Array, ...], size: int, *, is_fixed: bool) -> tuple[tuple[Array, ...], ...]:
    count = len(arrays[0])
    if is_fixed and count % size:
        rows = padded_batch_rows(count, size)
        return tuple(tuple(array[row] for array in arrays) for row in rows)
    return tuple(tuple(array[start : start + size] for array in arrays) for start in range(0, count, size))


@dataclass(frozen=True, slots=True)
class ExportJob:
    """A model on its way to another format."""

    file: ModelFile
    """The source, without what pruning has put around its weights."""
    request: ExportRequest
    inputs: tuple[InputSpec, ...] = ()
    """What goes into the result."""
    samples: Samples = NO_SAMPLES
    runnable: Any = None
    """The source in its runtime, as the opener of the route has made it; None where bytes are enough."""
    scratch: Path = Path()
