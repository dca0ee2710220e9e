"""What a trained model does not need, part by part: the words that every format's stripper is spoken to in."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Part(StrEnum):
    """A kind of dead weight."""

    MASKS = "masks"
    """Masks of pruning; the weights come out as weight times mask."""
    WRAPPERS = "wrappers"
    """What pruning has put around layers: thresholds, steps, names, classes."""
    OPTIMIZER = "optimizer"
    TRAINING = "training"
    """Losses, metrics, epochs, schedulers, callbacks, averaged copies of the weights."""
    GRADIENTS = "gradients"
    EXAMPLES = "examples"
    """Inputs that a program was exported with, which it keeps to be tried."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What is to go."""

    parts: frozenset[Part] = frozenset(Part)
    is_half: bool = False
    """Whether 32-bit and wider floats become 16-bit ones."""


@dataclass(frozen=True, slots=True)
class Removed:
    """Something that went."""

    name: str
    part: Part
    bytes: int
