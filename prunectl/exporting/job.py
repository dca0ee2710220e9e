"""The inputs of a converter: the source loaded in its runtime, its input specs (refined by `--input`) and samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from prunectl.analysis.timing import Timed
from prunectl.calibration.session import load_inputs, padded_batch_rows
from prunectl.channels.lengths import InputOption, OpenShape, in_order, shape_text
from prunectl.errors import UsageError
from prunectl.exporting.request import BATCH_SIZE, SAMPLES, ExportRequest
from prunectl.formats.base import Array, ModelFile
from prunectl.training.backend import LoadOptions, ModelSignature, TensorSpec
from prunectl.training.data.functions import random_array
from prunectl.training.data.source import EpochOrder
from prunectl.training.task import shape_matches


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One input of a model."""

    name: str
    shape: OpenShape | None
    """With the batch axis; None for an open axis, and None for the whole shape if it is unknown."""
    dtype: str
    """A NumPy name such as float32; empty if unknown."""
    is_declared: bool = True
    """Whether the model declares this input; otherwise it was guessed from the first layer."""
    usual: OpenShape | None = None
    """Default shape without `--input`, for a model that accepts several shapes."""


@dataclass(frozen=True, slots=True)
class TimedOptions(LoadOptions):
    """Options to load a model whose speed is measured."""

    threads: int = 1


def threads_of(origin: LoadOptions) -> int:
    """Number of threads to run a model with; 0 leaves the number to its opener."""
    return origin.threads if isinstance(origin, TimedOptions) else 0


class RunnableModel(Protocol):
    """A model loaded in its own runtime."""

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """The inputs, in order."""

    @property
    def is_channels_first(self) -> bool:
        """Whether images are CHW, and not HWC."""

    @property
    def runtime(self) -> str:
        """Name of the runtime for users, such as onnxruntime."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user about how it is run."""

    def run(self, inputs: tuple[Array, ...]) -> dict[str, Array]:
        """The outputs for one batch, by name and in order."""

    def prepare(self, inputs: tuple[Array, ...]) -> Timed:
        """A function that runs one batch per call; the inputs are converted for the runtime beforehand."""


def signature_of(inputs: tuple[InputSpec, ...], *, is_channels_first: bool) -> ModelSignature:
    """The signature to which data is adapted."""
    ports = tuple(TensorSpec(spec.name, None if spec.shape is None else spec.shape[1:], spec.dtype) for spec in inputs)
    return ModelSignature(ports, (), is_channels_first=is_channels_first)


def apply_input_options(inputs: tuple[InputSpec, ...], options: Sequence[InputOption]) -> tuple[InputSpec, ...]:
    """The inputs of a model refined by `--input`, matched by name or else by order; contradictions are refused."""
    if not options:
        return tuple(replace(spec, shape=spec.usual or spec.shape) for spec in inputs)
    ordered = in_order(options, [spec.name for spec in inputs])
    return tuple(_apply_option(spec, option) for spec, option in zip(inputs, ordered, strict=True))


def _apply_option(spec: InputSpec, option: InputOption) -> InputSpec:
    if spec.is_declared and spec.dtype and option.dtype and option.dtype != spec.dtype:
        raise UsageError(f"the input {spec.name} of the model is {spec.dtype}, but --input gives {option.dtype}")
    if spec.shape is not None and not shape_matches(option.shape, spec.shape):
        raise UsageError(
            f"the input {spec.name} of the model has the shape {shape_text(spec.shape)}, "
            f"but --input gives {shape_text(option.shape)}",
            hint="the length of an axis that the model fixes cannot be changed",
        )
    return replace(spec, name=option.name or spec.name, shape=option.shape, dtype=option.dtype or spec.dtype)


_IMAGE_LENGTH, _SEQUENCE_LENGTH, _SOUND_LENGTH = 224, 128, 16_000
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


_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
"""Examples are read and checked in float32, as NumPy has no bfloat16; only the samples are rounded to it."""

NO_SAMPLES = Samples((), is_data=False)


def make_samples(runnable: RunnableModel, inputs: tuple[InputSpec, ...], request: ExportRequest) -> Samples:
    """Sample inputs for a model: from `--data`, or random."""
    fixed_size = next((spec.shape[0] for spec in inputs if spec.shape), None)
    batch_size = fixed_size or request.batch_size or BATCH_SIZE
    if request.data:
        signature = signature_of(inputs, is_channels_first=runnable.is_channels_first)
        order = EpochOrder(request.batch_size or BATCH_SIZE, request.seed or 0, is_shuffled=False)
        arrays, notes = load_inputs(request.data, signature, request.samples or SAMPLES, order)
    else:
        # One example more than a batch, so that a batch of one is run too; not if the batch size is fixed.
        arrays, notes = (
            _random_arrays(inputs, request.samples or batch_size + (fixed_size is None), request.seed or 0),
            (),
        )
    arrays = tuple(
        array.astype(_BFLOAT16) if spec.dtype == _BFLOAT16.name else array
        for array, spec in zip(arrays, inputs, strict=True)
    )
    return Samples(_batches(arrays, batch_size, is_fixed=fixed_size is not None), bool(request.data), notes)


def _random_arrays(inputs: tuple[InputSpec, ...], count: int, seed: int) -> tuple[Array, ...]:
    random = np.random.default_rng(seed)
    return tuple(_random_array(random, spec, count) for spec in inputs)


def _example_shape(spec: InputSpec) -> tuple[int, ...]:
    if spec.shape is None:
        raise _unknown_shape_error(spec)
    return tuple(_OPEN_LENGTH if length is None else length for length in spec.shape[1:])


def _unknown_shape_error(spec: InputSpec) -> UsageError:
    shape = "1,128" if spec.dtype in {"int32", "int64"} else "1,3,224,224"
    return UsageError(
        f"the model does not give the shape of its input {spec.name}",
        hint=f"add --input {spec.name}:{shape}, or --data SPEC",
    )


def check_known(inputs: tuple[InputSpec, ...], request: ExportRequest) -> None:
    """Refuse open axes that neither `--input` nor `--data` closes: no sample could be made."""
    for spec in inputs:
        if request.data or request.input or spec.usual or (spec.shape is not None and None not in spec.shape[1:]):
            continue
        if spec.shape is None:
            raise _unknown_shape_error(spec)
        raise UsageError(
            f"the input {spec.name} of the model has the shape {shape_text(spec.shape)}, whose open axes need a length",
            hint=f"add --input {spec.name}:{_shape_hint(spec.shape, spec.dtype)} "
            "(? leaves an axis open), or --data SPEC",
        )


def _shape_hint(shape: OpenShape, dtype: str) -> str:
    """A plausible shape for a hint: open axes get the usual length of images or sequences, or a second of sound."""
    is_sound = len(shape) == 2 and dtype.startswith("float")
    open_length = _IMAGE_LENGTH if len(shape) > 3 else _SOUND_LENGTH if is_sound else _SEQUENCE_LENGTH
    batch, *others = shape
    return ",".join(map(str, (batch or 1, *(length or open_length for length in others))))


def _random_array(random: np.random.Generator, spec: InputSpec, count: int) -> Array:
    shape, dtype = (count, *_example_shape(spec)), spec.dtype
    if spec.name.endswith("attention_mask"):
        # Frameworks differ in their outputs where a mask hides every token.
        return np.ones(shape, dtype)
    if spec.name.endswith(("token_type_ids", "bbox")):
        # Zeros are always valid: a model may have a single token type, and a box must not end before it begins.
        return np.zeros(shape, dtype or "int64")
    if dtype and not dtype.startswith(("int", "uint", "bool", "float", "bfloat")):
        raise UsageError(
            f"the model takes inputs of type {dtype}, for which prunectl has no values",
            hint="save and export only its layers from the first one that takes numbers on"
            if dtype == "string"
            else "",
        )
    return random_array(random, shape, dtype).astype(dtype or "float32")


def _batches(arrays: tuple[Array, ...], size: int, *, is_fixed: bool) -> tuple[tuple[Array, ...], ...]:
    count = len(arrays[0])
    if is_fixed and count % size:
        rows = padded_batch_rows(count, size)
        return tuple(tuple(array[row] for array in arrays) for row in rows)
    return tuple(tuple(array[start : start + size] for array in arrays) for start in range(0, count, size))


@dataclass(frozen=True, slots=True)
class ExportJob:
    """One export: the source, the request and the samples to compare on."""

    file: ModelFile
    """The source, stripped of pruning wrappers."""
    request: ExportRequest
    inputs: tuple[InputSpec, ...] = ()
    """Inputs of the exported model."""
    samples: Samples = NO_SAMPLES
    runnable: Any = None
    """The source in its runtime, as the route's opener returned it; None if the route only reads bytes."""
    scratch: Path = Path()
