"""What is measured of a layer that is pruned: each has a name, a unit and a number for every sparsity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from prunectl.calibration.sensitivity import (
    SPARSITIES,
    Collapse,
    LayerSensitivity,
    Sensitivity,
    SensitivityPoint,
    collapses,
)
from prunectl.reporting.report import Cell, Column, Report, Section, Table, Unit
from prunectl.units import count, percent


@dataclass(frozen=True, slots=True)
class Measure:
    """One number of a point."""

    name: str
    unit: Unit
    of: Callable[[SensitivityPoint], float | None]
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
    costs = {layer.name: cost for layer in found.layers if (cost := _metric_drop(found, layer, measure)) is not None}
    worst = sorted(costs, key=lambda name: -costs[name])[:_MOST]
    longest = max((costs[name] for name in worst), default=0.0)
    rows: list[tuple[Cell, ...]] = [
        (_short(name), _format(costs[name], measure), _bar(costs[name], longest)) for name in worst
    ]
    what = "rise of loss" if measure.name == "loss" else measure.name
    columns = (Column(f"worst at {100 * SPARSITIES[_AT]:.0f} %"), Column(what), Column(""))
    return Table("most sensitive", columns, tuple(rows))


def _metric_drop(found: Sensitivity, layer: LayerSensitivity, measure: Measure) -> float | None:
    value = measure.of(layer.points[_AT])
    if value is None or measure.name != "loss" or found.base is None or found.base.loss is None:
        return value
    return value - found.base.loss


def _bar(cost: float, longest: float) -> str:
    return "#" * round(max(cost, 0.0) / longest * _BAR_WIDTH) if longest > 0 else ""


def _format(cost: float, measure: Measure) -> str:
    return f"{cost:.4g}" if measure.name == "loss" else percent(cost)


def _short(name: str) -> str:
    # The end of a name tells layers apart.
    return name if len(name) <= _NAME_WIDTH else f"…{name[1 - _NAME_WIDTH :]}"


_SHOWN = 5


def add_sensitivity(report: Report, each: Sequence[Sensitivity]) -> Report:
    """Return the report on some models with what is known of how their layers suffer."""
    ordered = [_in_order(model, found) for model, found in zip(report.models, each, strict=True)]
    rows = [
        (str(model["path"]), layer.name, layer.weights, measure.name, *map(measure.of, layer.points))
        for model, found in zip(report.models, ordered, strict=True)
        for layer in found.layers
        for measure in measures(found)
    ]
    columns = (Column("path"), Column("tensor"), Column("weights", Unit.COUNT), Column("measure"))
    return replace(
        report,
        models=tuple(_with_json(model, found) for model, found in zip(report.models, ordered, strict=True)),
        main=Table("sensitivity", (*columns, *_heads(Unit.NUMBER)), tuple(rows)),
        sections=tuple(_with_tables(part, found) for part, found in zip(report.sections, ordered, strict=True)),
    )


def _in_order(model: dict[str, Any], found: Sensitivity) -> Sensitivity:
    """Return layers in the order in which the report has the tensors."""
    places = {layer["name"]: place for place, layer in enumerate(model["layers"])}
    return replace(found, layers=tuple(sorted(found.layers, key=lambda layer: places[layer.name])))


def _heads(unit: Unit) -> tuple[Column, ...]:
    return tuple(Column(f"{100 * sparsity:.0f} %", unit) for sparsity in SPARSITIES)


def _with_tables(section: Section, found: Sensitivity) -> Section:
    bars = plot(found)
    tables = (*(_table(found, measure) for measure in measures(found)), *([bars] if bars is not None else []))
    return replace(section, tables=(*section.tables, *tables), remarks=(*section.remarks, *_remarks(found)))


def _table(found: Sensitivity, measure: Measure) -> Table:
    columns = (Column(f"{measure.name} at"), Column("weights", Unit.COUNT, is_optional=True), *_heads(measure.unit))
    rows: list[tuple[Cell, ...]] = [
        (layer.name, layer.weights, *map(measure.of, layer.points)) for layer in found.layers
    ]
    return Table(measure.name, columns, tuple(rows))


def _remarks(found: Sensitivity) -> tuple[str, ...]:
    return (*_measured(found), *found.notes, *_warnings(found))


def _measured(found: Sensitivity) -> tuple[str, ...]:
    if not found.layers:
        return ()
    alone = "Each tensor is pruned by magnitude alone, the others stay as they are."
    if not found.data:
        estimate = "A weight error is the share of a tensor's norm that goes: an estimate, as no data was looked at."
        return (f"{alone} {estimate} Add --data SPEC to measure what comes out.",)
    examples = f"{count(found.examples)} {'example' if found.examples == 1 else 'examples'} of {found.data}"
    said = f"{alone} Output errors are those of {examples}, relative to the norm of the layer's outputs without bias."
    if found.base is None or found.base.loss is None:
        return (said,)
    accuracy = f" and its accuracy {percent(found.base.accuracy)}" if found.base.accuracy is not None else ""
    return (said, f"As it is, the loss of the model is {found.base.loss:.4g}{accuracy} over these examples.")


def _warnings(found: Sensitivity) -> tuple[str, ...]:
    broken = collapses(found)
    if not broken:
        return ()
    more = f"; and {len(broken) - _SHOWN} others" if len(broken) > _SHOWN else ""
    return (f"These would collapse: {'; '.join(map(_told, broken[:_SHOWN]))}{more}.",)


def _told(one: Collapse) -> str:
    return f"{one.name} from {100 * one.sparsity:.0f} % on ({', '.join(one.reasons)})"


def _with_json(model: dict[str, Any], found: Sensitivity) -> dict[str, Any]:
    known = {layer.name: layer for layer in found.layers}
    layers = [
        {**layer, "sensitivity": _layer_json(known[layer["name"]]) if layer["name"] in known else None}
        for layer in model["layers"]
    ]
    whole = {
        "data": found.data or None,
        "examples": found.examples,
        "loss": found.base.loss if found.base else None,
        "accuracy": found.base.accuracy if found.base else None,
        "collapses": [{"name": one.name, "sparsity": one.sparsity, "reasons": one.reasons} for one in collapses(found)],
        "remarks": _remarks(found),
    }
    return {**model, "layers": layers, "sensitivity": whole}


def _layer_json(layer: LayerSensitivity) -> list[dict[str, float]]:
    return [_point_json(point) for point in layer.points]


def _point_json(point: SensitivityPoint) -> dict[str, float]:
    score = point.score
    facts = {
        "sparsity": point.sparsity,
        "weight_error": point.weight_error,
        "output_error": point.output_error,
        "loss": score.loss if score else None,
        "accuracy": score.accuracy if score else None,
    }
    return {name: value for name, value in facts.items() if value is not None}
