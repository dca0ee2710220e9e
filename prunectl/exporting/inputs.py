"""A model that runs: what goes in, what comes out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from prunectl.errors import UsageError
from prunectl.formats.base import Array
from prunectl.training.backend import Port, Signature

Axes = tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One input of a model."""

    name: str
    shape: Axes | None
    """With the axis of the examples; None for an axis of any length, or for all of them where they are unknown."""
    dtype: str
    """Such as float32; empty if unknown."""
    is_sure: bool = True
    """Whether the model itself says so, and it is no guess by its first layer."""


class RunnableModel(Protocol):
    """A model in its own runtime."""

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """What goes in."""

    @property
    def is_channels_first(self) -> bool:
        """Whether images are CHW, and not HWC."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of how it is run."""

    def run(self, inputs: tuple[Array, ...]) -> dict[str, Array]:
        """Return what comes out of one batch, by name and in order."""


def signature_of(flows: tuple[InputSpec, ...], *, is_channels_first: bool) -> Signature:
    """Return inputs as data is fitted to them."""
    ports = tuple(Port(flow.name, None if flow.shape is None else flow.shape[1:], flow.dtype) for flow in flows)
    return Signature(ports, (), is_channels_first=is_channels_first)


def text(shape: Axes | None) -> str:
    """Return a shape as users write it."""
    return "?" if shape is None else ",".join("?" if length is None else str(length) for length in shape)


_EXAMPLE = "--input x:1,3,224,224:f32, where -1 or ? leaves an axis open"
_DTYPES = {
    "f16": "float16",
    "f32": "float32",
    "f64": "float64",
    "i8": "int8",
    "i16": "int16",
    "i32": "int32",
    "i64": "int64",
    "u8": "uint8",
    "bool": "bool",
}
_SHAPE = re.compile(r"(?:\?|-1|[1-9]\d*)(?:,(?:\?|-1|[1-9]\d*))*")


@dataclass(frozen=True, slots=True)
class InputOption:
    """One input, as it was typed."""

    name: str
    shape: Axes
    dtype: str


def parse(word: str) -> InputOption:
    """Return what was said of an input: a name and a type may be left out."""
    parts = word.split(":")
    dtype = ""
    if len(parts) > 1 and not _SHAPE.fullmatch(parts[-1]):
        dtype = _dtype(parts.pop(), word)
    if len(parts) > 2 or not _SHAPE.fullmatch(parts[-1]):
        raise UsageError(f"--input {word} says no shape", hint=_EXAMPLE)
    shape = tuple(None if axis in {"?", "-1"} else int(axis) for axis in parts[-1].split(","))
    return InputOption(parts[0] if len(parts) == 2 else "", shape, dtype)


def _dtype(name: str, word: str) -> str:
    if name in _DTYPES.values():
        return name
    if name not in _DTYPES:
        raise UsageError(f"--input {word} ends with no type", hint=f"types: {', '.join(_DTYPES)}")
    return _DTYPES[name]


def apply_input_options(flows: tuple[InputSpec, ...], said: Sequence[InputOption]) -> tuple[InputSpec, ...]:
    """Return the inputs of a model as the user says, refused where the model says otherwise."""
    if not said:
        return flows
    if len(said) != len(flows):
        names = ", ".join(flow.name for flow in flows)
        raise UsageError(f"the model has {len(flows)} inputs ({names}), and --input says {len(said)}")
    known = {flow.name for flow in flows}
    if all(one.name in known for one in said) and len({one.name for one in said}) == len(said):
        by_name = {one.name: one for one in said}
        said = [by_name[flow.name] for flow in flows]
    return tuple(_settled(flow, one) for flow, one in zip(flows, said, strict=True))


def _settled(flow: InputSpec, said: InputOption) -> InputSpec:
    if flow.is_sure and flow.dtype and said.dtype and said.dtype != flow.dtype:
        raise UsageError(f"the input {flow.name} of the model is {flow.dtype}, and --input says {said.dtype}")
    if flow.shape is not None and not _fits(said.shape, flow.shape):
        raise UsageError(
            f"the input {flow.name} of the model is {text(flow.shape)}, and --input says {text(said.shape)}",
            hint="an axis that the model fixes keeps its length",
        )
    return replace(flow, name=said.name or flow.name, shape=said.shape, dtype=said.dtype or flow.dtype)


def _fits(said: Axes, known: Axes) -> bool:
    return len(said) == len(known) and all(
        length is None or length == one for one, length in zip(said, known, strict=True)
    )
