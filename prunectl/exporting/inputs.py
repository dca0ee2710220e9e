"""Input specifications of a runnable model, and the `--input NAME:SHAPE:TYPE` options that refine them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from prunectl.channels.lengths import InputOption, OpenShape
from prunectl.errors import UsageError
from prunectl.formats.base import Array
from prunectl.training.backend import ModelSignature, TensorSpec


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One input of a model."""

    name: str
    shape: OpenShape | None
    """With the batch axis; None for an axis of any length, or for the whole shape where it is unknown."""
    dtype: str
    """A NumPy name such as float32; empty if unknown."""
    is_declared: bool = True
    """Whether the model itself declares it; else it is a guess by the first layer."""


class RunnableModel(Protocol):
    """A model in its own runtime."""

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """The inputs, in order."""

    @property
    def is_channels_first(self) -> bool:
        """Whether images are CHW, and not HWC."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user about how it is run."""

    def run(self, inputs: tuple[Array, ...]) -> dict[str, Array]:
        """The outputs for one batch, by name and in order."""


def signature_of(inputs: tuple[InputSpec, ...], *, is_channels_first: bool) -> ModelSignature:
    """The signature that data is adapted to."""
    ports = tuple(TensorSpec(flow.name, None if flow.shape is None else flow.shape[1:], flow.dtype) for flow in inputs)
    return ModelSignature(ports, (), is_channels_first=is_channels_first)


def shape_text(shape: OpenShape | None) -> str:
    """A shape as users write it."""
    return "?" if shape is None else ",".join("?" if length is None else str(length) for length in shape)


def apply_input_options(inputs: tuple[InputSpec, ...], options: Sequence[InputOption]) -> tuple[InputSpec, ...]:
    """The inputs of a model as `--input` specifies them, by name or else by order; contradictions are refused."""
    if not options:
        return inputs
    if len(options) != len(inputs):
        names = ", ".join(spec.name for spec in inputs)
        raise UsageError(f"the model has {len(inputs)} inputs ({names}), and --input says {len(options)}")
    known = {spec.name for spec in inputs}
    if all(option.name in known for option in options) and len({option.name for option in options}) == len(options):
        by_name = {option.name: option for option in options}
        options = [by_name[spec.name] for spec in inputs]
    return tuple(_apply_option(spec, option) for spec, option in zip(inputs, options, strict=True))


def _apply_option(spec: InputSpec, option: InputOption) -> InputSpec:
    if spec.is_declared and spec.dtype and option.dtype and option.dtype != spec.dtype:
        raise UsageError(f"the input {spec.name} of the model is {spec.dtype}, and --input says {option.dtype}")
    if spec.shape is not None and not _fits(option.shape, spec.shape):
        raise UsageError(
            f"the input {spec.name} of the model is {shape_text(spec.shape)}, "
            f"and --input says {shape_text(option.shape)}",
            hint="an axis that the model fixes keeps its length",
        )
    return replace(spec, name=option.name or spec.name, shape=option.shape, dtype=option.dtype or spec.dtype)


def _fits(shape: OpenShape, known: OpenShape) -> bool:
    return len(shape) == len(known) and all(
        size is None or size == known_size for known_size, size in zip(shape, known, strict=True)
    )
