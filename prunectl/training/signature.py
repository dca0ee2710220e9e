"""What a model takes and gives, as far as its data must know."""

from __future__ import annotations

from dataclasses import dataclass

from prunectl.training.ending import Ending


@dataclass(frozen=True, slots=True)
class Port:
    """One input or output of a model."""

    name: str
    shape: tuple[int | None, ...] | None
    """Without the batch axis; None where an axis, or all of it, is unknown."""
    dtype: str
    """Such as float32 or int64; empty if unknown."""
    ending: Ending = Ending.UNKNOWN
    """The activation that an output ends with."""


@dataclass(frozen=True, slots=True)
class Signature:
    """Everything that goes into a model and comes out of it."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    is_channels_first: bool
    """Whether images are CHW, as in PyTorch, and not HWC."""
