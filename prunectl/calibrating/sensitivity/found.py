"""What is known of how much layers suffer from pruning."""

from __future__ import annotations

from dataclasses import dataclass

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
"""At which each tensor is looked at."""


@dataclass(frozen=True, slots=True)
class Score:
    """How well a model answers the examples."""

    loss: float | None
    """None where it is no finite number."""
    accuracy: float | None = None


@dataclass(frozen=True, slots=True)
class Point:
    """What becomes of a tensor, and of the model with it, when the tensor alone is pruned by magnitude."""

    sparsity: float
    weight_error: float
    """What goes, as a share of the norm of the weights."""
    output_error: float | None = None
    """How far the layer's outputs are off, as a share of their norm; None where that was not seen."""
    score: Score | None = None
    """What the whole model makes of the examples; None where that was not asked."""


@dataclass(frozen=True, slots=True)
class LayerSensitivity:
    """One tensor at every sparsity."""

    name: str
    weights: int
    points: tuple[Point, ...]
    dead_from: float | None = None
    """The first sparsity at which one of its outputs loses all its weights."""


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """All tensors of a model, in the order of its file."""

    layers: tuple[LayerSensitivity, ...]
    data: str = ""
    """What it was looked at with; empty if weights were all there was."""
    examples: int = 0
    base: Score | None = None
    """How the model answers as it is."""
    notes: tuple[str, ...] = ()
