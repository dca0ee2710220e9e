"""The layers that suffer most, as bars."""

from __future__ import annotations

from prunectl.calibrating.sensitivity.found import SPARSITIES, LayerSensitivity, Sensitivity
from prunectl.reporting.sensitivity_measures import Measure, measures
from prunectl.reporting.table import Cell, Column, Table
from prunectl.units import percent

_AT = SPARSITIES.index(0.8)
_MOST = 8
_BAR_WIDTH = 36
_NAME_WIDTH = 26


def plot(found: Sensitivity) -> Table | None:
    """Return bars of what a layer costs at one sparsity, the longest on top; none if there is nothing to compare."""
    known = [measure for measure in measures(found) if measure.name != "accuracy"]
    if not known:
        return None
    # The loss tells more than an accuracy, which takes a wrong answer to move.
    measure = known[-1]
    costs = {layer.name: cost for layer in found.layers if (cost := _cost(found, layer, measure)) is not None}
    worst = sorted(costs, key=lambda name: -costs[name])[:_MOST]
    longest = max((costs[name] for name in worst), default=0.0)
    rows: list[tuple[Cell, ...]] = [
        (_short(name), _spelled(costs[name], measure), _bar(costs[name], longest)) for name in worst
    ]
    what = "rise of loss" if measure.name == "loss" else measure.name
    columns = (Column(f"worst at {100 * SPARSITIES[_AT]:.0f} %"), Column(what), Column(""))
    return Table("most sensitive", columns, tuple(rows))


def _cost(found: Sensitivity, layer: LayerSensitivity, measure: Measure) -> float | None:
    value = measure.of(layer.points[_AT])
    if value is None or measure.name != "loss" or found.base is None or found.base.loss is None:
        return value
    return value - found.base.loss


def _bar(cost: float, longest: float) -> str:
    return "#" * round(max(cost, 0.0) / longest * _BAR_WIDTH) if longest > 0 else ""


def _spelled(cost: float, measure: Measure) -> str:
    return f"{cost:.4g}" if measure.name == "loss" else percent(cost)


def _short(name: str) -> str:
    # The end of a name tells layers apart.
    return name if len(name) <= _NAME_WIDTH else f"…{name[1 - _NAME_WIDTH :]}"
