"""What `inspect --sensitivity` adds to a report: tables, bars, warnings, and keys of the JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from prunectl.calibrating.sensitivity.collapse import Collapse, collapses
from prunectl.calibrating.sensitivity.found import SPARSITIES, LayerSensitivity, Point, Sensitivity
from prunectl.reporting.report import Report, Section
from prunectl.reporting.sensitivity_measures import Measure, measures
from prunectl.reporting.sensitivity_plot import plot
from prunectl.reporting.table import Cell, Column, Table, Unit
from prunectl.units import count, percent

_SHOWN = 5


def with_sensitivity(report: Report, each: Sequence[Sensitivity]) -> Report:
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


def _point_json(point: Point) -> dict[str, float]:
    score = point.score
    facts = {
        "sparsity": point.sparsity,
        "weight_error": point.weight_error,
        "output_error": point.output_error,
        "loss": score.loss if score else None,
        "accuracy": score.accuracy if score else None,
    }
    return {name: value for name, value in facts.items() if value is not None}
