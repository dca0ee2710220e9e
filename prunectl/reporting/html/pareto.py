"""Every point of a sweep, how good over how big, and the line that no other is above."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prunectl.reporting.html import axes
from prunectl.reporting.html.axes import Scale
from prunectl.reporting.html.text import safe
from prunectl.sweeping.combined import UNSTRUCTURED
from prunectl.units import Units, nbytes, percent


def pareto(models: Sequence[dict[str, Any]], units: Units) -> str:
    """Return a picture of the points; nothing where there is no sweep."""
    # What came to no number has no place.
    points = [model for model in models if "point" in model and model["point"]["value"] is not None]
    if not points:
        return ""
    x = axes.across([point["bytes"]["compressed"] for point in points])
    y = axes.upwards([point["point"]["value"] for point in points])
    metric = points[0]["point"]["metric"]
    marks = {mark: nbytes(max(round(mark), 0), units) for mark in x.marks}
    best = sorted((point for point in points if point["point"]["is_front"]), key=_size)
    inside = axes.frame(x, y, ("gzip", metric), marks) + _steps(best, x, y)
    inside += "".join(_dot(point, x, y, units) for point in points)
    return axes.plot(f"{metric} over gzip size of {len(points)} models, {len(best)} on the Pareto front", inside)


def _size(point: dict[str, Any]) -> int:
    size: int = point["bytes"]["compressed"]
    return size


def _steps(best: Sequence[dict[str, Any]], x: Scale, y: Scale) -> str:
    places = [(x.at(_size(point)), y.at(point["point"]["value"])) for point in best]
    path = f"M{places[0][0]:.1f} {places[0][1]:.1f}" + "".join(f"H{across:.1f}V{up:.1f}" for across, up in places[1:])
    return f'<path class="step" d="{path}"/>'


def _dot(model: dict[str, Any], x: Scale, y: Scale, units: Units) -> str:
    point = model["point"]
    words = [point[key] for key in ("strategy", "scope", "schedule", "pattern", "params")]
    words = [word for word in words if word and word != UNSTRUCTURED]
    name = " ".join([*words, percent(point["sparsity"])]) if words else "as it is"
    told = f"{name}: {point['metric']} {point['value']:.4g}, {nbytes(_size(model), units)}"
    kind, radius = ("best", 5) if point["is_front"] else ("dot", 4)
    place = f'cx="{x.at(_size(model)):.1f}" cy="{y.at(point["value"]):.1f}"'
    return f'<circle class="{kind}" {place} r="{radius}"><title>{safe(told)}</title></circle>'
