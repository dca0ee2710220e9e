"""Which layers would break, and at which sparsity first."""

from __future__ import annotations

from dataclasses import dataclass

from prunectl.calibrating.sensitivity.found import LayerSensitivity, Score, Sensitivity

MAX_OUTPUT_ERROR = 0.5
MAX_ACCURACY_FALL = 0.1


@dataclass(frozen=True, slots=True)
class Collapse:
    """A tensor, the first sparsity at which it breaks, and how."""

    name: str
    sparsity: float
    reasons: tuple[str, ...]
    size: float
    """How far its outputs are off there, or its weights where that is not known."""


def collapses(found: Sensitivity) -> tuple[Collapse, ...]:
    """Return the tensors that break, the worst first: those that break early, then those that break most."""
    each = filter(None, (_collapse(layer, found.base) for layer in found.layers))
    return tuple(sorted(each, key=lambda one: (one.sparsity, -one.size)))


def _collapse(layer: LayerSensitivity, base: Score | None) -> Collapse | None:
    for point in layer.points:
        reasons = []
        if layer.dead_from is not None and layer.dead_from <= point.sparsity:
            reasons.append("an output loses all its weights")
        if point.output_error is not None and point.output_error > MAX_OUTPUT_ERROR:
            reasons.append(f"its outputs are {100 * point.output_error:.0f} % off")
        fall = _fall(base, point.score)
        if fall > MAX_ACCURACY_FALL:
            reasons.append(f"accuracy falls by {100 * fall:.0f} points")
        if reasons:
            size = point.weight_error if point.output_error is None else point.output_error
            return Collapse(layer.name, point.sparsity, tuple(reasons), size)
    return None


def _fall(base: Score | None, now: Score | None) -> float:
    if base is None or now is None or base.accuracy is None or now.accuracy is None:
        return 0.0
    # In float32 for some: a fall by just as much as is allowed is not to depend on rounding.
    return round(base.accuracy - now.accuracy, 6)
