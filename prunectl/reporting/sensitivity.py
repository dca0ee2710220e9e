"""The report on sensitivity: how much each layer suffers from pruning at every sparsity."""

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
class SensitivityScore:
    """A metric that is measured at each sparsity."""

    name: str
    unit: Unit
    value_of: Callable[[SensitivityPoint], float | None]
    higher_is_better: bool = False


METRICS = (
    SensitivityScore("weight error", Unit.RATIO, lambda point: point.weight_error),
    SensitivityScore("output error", Unit.RATIO, lambda point: point.output_error),
    SensitivityScore("loss", Unit.NUMBER, lambda point: point.score.loss if point.score else None),
    SensitivityScore(
        "accuracy", Unit.RATIO, lambda point: point.score.accuracy if point.score else None, higher_is_better=True
    ),
)


def known_metrics(sensitivity: Sensitivity) -> tuple[SensitivityScore, ...]:
    """The metrics that were measured for at least one layer."""
    points = [point for layer in sensitivity.layers for point in layer.points]
    return tuple(metric for metric in METRICS if any(metric.value_of(point) is not None for point in points))


_AT = SPARSITIES.index(0.8)
_MOST = 8
_BAR_WIDTH = 36
_NAME_WIDTH = 26


def plot(sensitivity: Sensitivity) -> Table | None:
    """A bar chart of the most sensitive layers at one sparsity; None if there is nothing to compare."""
    metrics = [metric for metric in known_metrics(sensitivity) if metric.name != "accuracy"]
    if not metrics:
        return None
    # The loss is more sensitive than accuracy, which changes only when an answer becomes wrong.
    metric = metrics[-1]
    costs = {
        layer.name: cost
        for layer in sensitivity.layers
        if (cost := _metric_drop(sensitivity, layer, metric)) is not None
    }
    worst = sorted(costs, key=lambda name: -costs[name])[:_MOST]
    longest = max((costs[name] for name in worst), default=0.0)
    rows: list[tuple[Cell, ...]] = [
        (_short(name), _format(costs[name], metric), _bar(costs[name], longest)) for name in worst
    ]
    heading = "loss increase" if metric.name == "loss" else metric.name
    columns = (
        Column(f"worst at {100 * SPARSITIES[_AT]:.0f} %"),
        Column(heading),
        Column("", is_optional=True, title="bars", is_whole=True),
    )
    return Table("most sensitive", columns, tuple(rows))


def _metric_drop(sensitivity: Sensitivity, layer: LayerSensitivity, metric: SensitivityScore) -> float | None:
    value = metric.value_of(layer.points[_AT])
    if value is None or metric.name != "loss" or sensitivity.base is None or sensitivity.base.loss is None:
        return value
    return value - sensitivity.base.loss


def _bar(cost: float, longest: float) -> str:
    return "#" * round(max(cost, 0.0) / longest * _BAR_WIDTH) if longest > 0 else ""


def _format(cost: float, metric: SensitivityScore) -> str:
    return f"{cost:.4g}" if metric.name == "loss" else percent(cost)


def _short(name: str) -> str:
    # The ends of names distinguish layers.
    return name if len(name) <= _NAME_WIDTH else f"…{name[1 - _NAME_WIDTH :]}"


_SHOWN = 5


def add_sensitivity(report: Report, each: Sequence[Sensitivity]) -> Report:
    """Add the sensitivity of each model's layers to a report."""
    ordered = [_in_order(model, sensitivity) for model, sensitivity in zip(report.models, each, strict=True)]
    rows = [
        (str(model["path"]), layer.name, layer.weights, metric.name, *map(metric.value_of, layer.points))
        for model, sensitivity in zip(report.models, ordered, strict=True)
        for layer in sensitivity.layers
        for metric in known_metrics(sensitivity)
    ]
    columns = (Column("path"), Column("tensor"), Column("weights", Unit.COUNT), Column("measure", title="metric"))
    return replace(
        report,
        models=tuple(_with_json(model, sensitivity) for model, sensitivity in zip(report.models, ordered, strict=True)),
        table=Table("sensitivity", (*columns, *_heads(Unit.NUMBER)), tuple(rows)),
        sections=tuple(
            _with_tables(part, sensitivity) for part, sensitivity in zip(report.sections, ordered, strict=True)
        ),
    )


def _in_order(model: dict[str, Any], sensitivity: Sensitivity) -> Sensitivity:
    positions = {layer["name"]: position for position, layer in enumerate(model["layers"])}
    return replace(sensitivity, layers=tuple(sorted(sensitivity.layers, key=lambda layer: positions[layer.name])))


def _heads(unit: Unit) -> tuple[Column, ...]:
    return tuple(Column(f"{100 * sparsity:.0f} %", unit) for sparsity in SPARSITIES)


def _with_tables(section: Section, sensitivity: Sensitivity) -> Section:
    bars = plot(sensitivity)
    tables = (
        *(_table(sensitivity, metric) for metric in known_metrics(sensitivity)),
        *([bars] if bars is not None else []),
    )
    return replace(section, tables=(*section.tables, *tables), notes=(*section.notes, *_notes(sensitivity)))


def _table(sensitivity: Sensitivity, metric: SensitivityScore) -> Table:
    columns = (Column(f"{metric.name} at"), Column("weights", Unit.COUNT, is_optional=True), *_heads(metric.unit))
    rows: list[tuple[Cell, ...]] = [
        (layer.name, layer.weights, *map(metric.value_of, layer.points)) for layer in sensitivity.layers
    ]
    return Table(metric.name, columns, tuple(rows))


def _notes(sensitivity: Sensitivity) -> tuple[str, ...]:
    return (*_measured(sensitivity), *sensitivity.notes, *_warnings(sensitivity))


def _measured(sensitivity: Sensitivity) -> tuple[str, ...]:
    if not sensitivity.layers:
        return ()
    alone = "Each tensor was pruned on its own, by magnitude, with all others unchanged."
    if not sensitivity.data:
        estimate = "The weight error is the share of the tensor's norm that pruning removes, an estimate without data."
        return (f"{alone} {estimate} Add --data SPEC to measure the error of the outputs.",)
    examples = (
        f"{count(sensitivity.examples)} {'example' if sensitivity.examples == 1 else 'examples'} of {sensitivity.data}"
    )
    sentence = (
        f"{alone} Output errors were measured on {examples}, relative to the norm of the layer's outputs without bias."
    )
    if sensitivity.base is None or sensitivity.base.loss is None:
        return (sentence,)
    accuracy = (
        f" and an accuracy of {percent(sensitivity.base.accuracy)}" if sensitivity.base.accuracy is not None else ""
    )
    return (sentence, f"On these examples the unpruned model has a loss of {sensitivity.base.loss:.4g}{accuracy}.")


def _warnings(sensitivity: Sensitivity) -> tuple[str, ...]:
    broken = collapses(sensitivity)
    if not broken:
        return ()
    more = f"; and {len(broken) - _SHOWN} others" if len(broken) > _SHOWN else ""
    return (f"These layers would collapse: {'; '.join(map(_describe_collapse, broken[:_SHOWN]))}{more}.",)


def _describe_collapse(collapse: Collapse) -> str:
    return f"{collapse.name} from {100 * collapse.sparsity:.0f} % on ({', '.join(collapse.reasons)})"


def _with_json(model: dict[str, Any], sensitivity: Sensitivity) -> dict[str, Any]:
    known = {layer.name: layer for layer in sensitivity.layers}
    layers = [
        {**layer, "sensitivity": _layer_json(known[layer["name"]]) if layer["name"] in known else None}
        for layer in model["layers"]
    ]
    summary = {
        "data": sensitivity.data or None,
        "examples": sensitivity.examples,
        "loss": sensitivity.base.loss if sensitivity.base else None,
        "accuracy": sensitivity.base.accuracy if sensitivity.base else None,
        "collapses": [
            {"name": collapse.name, "sparsity": collapse.sparsity, "reasons": collapse.reasons}
            for collapse in collapses(sensitivity)
        ],
        "remarks": _notes(sensitivity),
    }
    return {**model, "layers": layers, "sensitivity": summary}


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
