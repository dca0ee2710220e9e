"""A model that runs: what goes in, what comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from prunectl.formats.base import Array
from prunectl.training.signature import Port, Signature

Axes = tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Flow:
    """One input of a model."""

    name: str
    shape: Axes | None
    """With the axis of the examples; None for an axis of any length, or for all of them where they are unknown."""
    dtype: str
    """Such as float32; empty if unknown."""
    is_sure: bool = True
    """Whether the model itself says so, and it is no guess by its first layer."""


class Live(Protocol):
    """A model in its own runtime."""

    @property
    def inputs(self) -> tuple[Flow, ...]:
        """What goes in."""

    @property
    def is_channels_first(self) -> bool:
        """Whether images are CHW, and not HWC."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of how it is run."""

    def run(self, inputs: tuple[Array, ...]) -> dict[str, Array]:
        """Return what comes out of one batch, by name and in order."""


def signature_of(flows: tuple[Flow, ...], *, is_channels_first: bool) -> Signature:
    """Return inputs as data is fitted to them."""
    ports = tuple(Port(flow.name, None if flow.shape is None else flow.shape[1:], flow.dtype) for flow in flows)
    return Signature(ports, (), is_channels_first=is_channels_first)


def text(shape: Axes | None) -> str:
    """Return a shape as users write it."""
    return "?" if shape is None else ",".join("?" if length is None else str(length) for length in shape)
