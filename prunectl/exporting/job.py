"""What a converter is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.calibration.session import load_inputs, padded_batch_rows
from prunectl.errors import UsageError
from prunectl.exporting.inputs import InputSpec, RunnableModel, signature_of, text
from prunectl.exporting.request import BATCH_SIZE, SAMPLES, ExportRequest
from prunectl.formats.base import Array, ModelFile
from prunectl.training.data.source import Order

_IMAGE_LENGTH, _SEQUENCE_LENGTH = 224, 128
_OPEN_LENGTH = 16
"""Of an axis that the user leaves open."""


@dataclass(frozen=True, slots=True)
class Samples:
    """Batches of inputs."""

    batches: tuple[tuple[Array, ...], ...]
    is_data: bool
    """Whether they are the user's, and not made up."""
    notes: tuple[str, ...] = ()

    @property
    def examples(self) -> int:
        """How many examples there are."""
        return sum(len(batch[0]) for batch in self.batches)


def samples(live: RunnableModel, flows: tuple[InputSpec, ...], request: ExportRequest) -> Samples:
    """Return inputs for a model: the user's, or random ones."""
    size = _size(flows)
    per_batch = size or request.batch_size or BATCH_SIZE
    if request.data:
        whole, notes = _of_data(live, flows, request)
    else:
        # One more than a batch: the last goes through alone, which a fixed batch would not take.
        whole, notes = _random(flows, request.samples or per_batch + (size is None), request.seed or 0), ()
    return Samples(_batches(whole, per_batch, is_fixed=size is not None), bool(request.data), notes)


def _size(flows: tuple[InputSpec, ...]) -> int | None:
    """Return how many examples a model takes at a time, if that is fixed."""
    return next((flow.shape[0] for flow in flows if flow.shape), None)


def _of_data(
    live: RunnableModel, flows: tuple[InputSpec, ...], request: ExportRequest
) -> tuple[tuple[Array, ...], tuple[str, ...]]:
    signature = signature_of(flows, is_channels_first=live.is_channels_first)
    order = Order(request.batch_size or BATCH_SIZE, request.seed or 0, is_shuffled=False)
    return load_inputs(request.data, signature, request.samples or SAMPLES, order)


def _random(flows: tuple[InputSpec, ...], count: int, seed: int) -> tuple[Array, ...]:
    random = np.random.default_rng(seed)
    return tuple(_filled(random, (count, *_lengths(flow)), flow.dtype) for flow in flows)


def _lengths(flow: InputSpec) -> tuple[int, ...]:
    if flow.shape is None:
        raise UsageError(
            f"the model does not say the shape of its input {flow.name}",
            hint=f"--input {flow.name}:1,3,224,224 says it; or --data SPEC",
        )
    return tuple(_OPEN_LENGTH if length is None else length for length in flow.shape[1:])


def check_known(flows: tuple[InputSpec, ...], request: ExportRequest) -> None:
    """Refuse inputs with open axes that neither --input nor --data closes, for nobody could try them."""
    for flow in flows:
        if request.data or request.inputs or (flow.shape is not None and None not in flow.shape[1:]):
            continue
        raise UsageError(
            f"the input {flow.name} of the model is {text(flow.shape)}: it does not say how long each axis is",
            hint=f"--input {flow.name}:{_example(flow)} says it (? leaves an axis open); or --data SPEC",
        )


def _example(flow: InputSpec) -> str:
    """Return a shape of as many axes as the model has, those that are open as images or sequences often are."""
    if flow.shape is None:
        return "1,3,224,224"
    open_length = _IMAGE_LENGTH if len(flow.shape) > 3 else _SEQUENCE_LENGTH
    batch, *others = flow.shape
    return ",".join(map(str, (batch or 1, *(length or open_length for length in others))))


def _filled(random: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    if dtype.startswith(("int", "uint", "bool")):
        # What these numbers count is unknown; 0 and 1 are within every vocabulary.
        return random.integers(0, 2, shape).astype(dtype)
    if dtype and not dtype.startswith("float"):
        raise UsageError(f"the model takes {dtype}, and no such inputs can be made up", hint="--data SPEC")
    return random.standard_normal(shape, np.float32).astype(dtype or "float32")


def _batches(whole: tuple[Array, ...], size: int, *, is_fixed: bool) -> tuple[tuple[Array, ...], ...]:
    count = len(whole[0])
    if is_fixed and count % size:
        rows = padded_batch_rows(count, size)
        return tuple(tuple(one[own] for one in whole) for own in rows)
    return tuple(tuple(one[at : at + size] for one in whole) for at in range(0, count, size))


@dataclass(frozen=True, slots=True)
class ExportJob:
    """A model on its way to another format."""

    file: ModelFile
    """The source, without what pruning has put around its weights."""
    request: ExportRequest
    flows: tuple[InputSpec, ...] = ()
    """What goes into the result."""
    samples: Samples | None = None
    live: Any = None
    """The source in its runtime, as the opener of the pair has made it."""
    scratch: Path = Path()

    @property
    def inputs(self) -> Samples:
        """The inputs that there are for whatever runs."""
        if self.samples is None:
            raise ValueError("only what runs has inputs")
        return self.samples


Writer = Callable[[ExportJob, Path], tuple[str, ...]]
"""Writes the result, and returns what the user should know of it."""
