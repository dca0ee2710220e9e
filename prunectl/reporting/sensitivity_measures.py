"""What is measured of a layer that is pruned: each has a name, a unit and a number for every sparsity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prunectl.calibrating.sensitivity.found import Point, Sensitivity
from prunectl.reporting.table import Unit


@dataclass(frozen=True, slots=True)
class Measure:
    """One number of a point."""

    name: str
    unit: Unit
    of: Callable[[Point], float | None]
    is_better_high: bool = False


MEASURES = (
    Measure("weight error", Unit.RATIO, lambda point: point.weight_error),
    Measure("output error", Unit.RATIO, lambda point: point.output_error),
    Measure("loss", Unit.NUMBER, lambda point: point.score.loss if point.score else None),
    Measure("accuracy", Unit.RATIO, lambda point: point.score.accuracy if point.score else None, is_better_high=True),
)


def measures(found: Sensitivity) -> tuple[Measure, ...]:
    """Return what is known of at least one layer."""
    points = [point for layer in found.layers for point in layer.points]
    return tuple(measure for measure in MEASURES if any(measure.of(point) is not None for point in points))
