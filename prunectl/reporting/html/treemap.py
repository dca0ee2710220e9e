"""Where do the bytes lie? A rectangle for each tensor, as big as its share; the fainter, the sparser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prunectl.reporting.html.text import safe, short
from prunectl.units import Units, count, nbytes, percent

_WIDTH, _HEIGHT = 800.0, 360.0
_LEAST_SHARE = 0.0003
"""Smaller ones are drawn as one: they would be less than a letter."""
_FAINT, _FULL = 0.12, 0.6
_LETTER, _LINE, _LEAST_LETTERS = 6.5, 14.0, 5


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle."""

    x: float
    y: float
    width: float
    height: float


def treemap(layers: Sequence[dict[str, Any]], units: Units) -> str:
    """Return a picture of the sizes of all tensors; nothing of none."""
    sized = sorted((layer for layer in layers if layer["bytes"] and not layer["tied_to"]), key=lambda it: -it["bytes"])
    total = sum(layer["bytes"] for layer in sized)
    if not total:
        return ""
    shown = [layer for layer in sized if layer["bytes"] >= _LEAST_SHARE * total]
    rest = sized[len(shown) :]
    sizes = [layer["bytes"] for layer in shown] + ([sum(layer["bytes"] for layer in rest)] if rest else [])
    boxes = squarified(sizes, Box(0.0, 0.0, _WIDTH, _HEIGHT))
    cells = [_cell(layer, box, units) for layer, box in zip(shown, boxes, strict=False)]
    if rest:
        cells.append(_drawn(boxes[-1], f"{count(len(rest))} smaller tensors: {nbytes(sizes[-1], units)}", "", _FAINT))
    label = f"size of {count(len(sized))} tensors, {nbytes(total, units)} in all"
    view = f'viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" width="{_WIDTH:g}"'
    return f'<svg {view} role="img" aria-label="{safe(label)}">{"".join(cells)}</svg>'


def squarified(sizes: Sequence[float], box: Box) -> list[Box]:
    """Return a box for each size, their areas in proportion, about as wide as high; the sizes fall."""
    scale = box.width * box.height / sum(sizes)
    areas = [size * scale for size in sizes]
    found: list[Box] = []
    while areas:
        side = min(box.width, box.height)
        taken = 1
        while taken < len(areas) and _worst(areas[: taken + 1], side) <= _worst(areas[:taken], side):
            taken += 1
        strip, areas = areas[:taken], areas[taken:]
        boxes, box = _laid(strip, box)
        found += boxes
    return found


def _worst(areas: Sequence[float], side: float) -> float:
    """Return how far from a square the worst box of a strip along a side is."""
    total = sum(areas)
    return max(side * side * areas[0] / (total * total), total * total / (side * side * areas[-1]))


def _laid(strip: Sequence[float], box: Box) -> tuple[list[Box], Box]:
    """Return the boxes of a strip along the shorter side, and what is left beside it."""
    total = sum(strip)
    found: list[Box] = []
    done = 0.0
    if box.width >= box.height:
        wide = total / box.height
        for area in strip:
            found.append(Box(box.x, box.y + done, wide, area / wide))
            done += area / wide
        return found, Box(box.x + wide, box.y, max(box.width - wide, 1e-9), box.height)
    high = total / box.width
    for area in strip:
        found.append(Box(box.x + done, box.y, area / high, high))
        done += area / high
    return found, Box(box.x, box.y + high, box.width, max(box.height - high, 1e-9))


def _cell(layer: dict[str, Any], box: Box, units: Units) -> str:
    sparsity = layer["sparsity"]
    told = f"{layer['name']}: {nbytes(layer['bytes'], units)}"
    told += f", {percent(sparsity)} zero" if sparsity is not None else ""
    return _drawn(box, told, layer["name"], _FAINT + (_FULL - _FAINT) * (1 - (sparsity or 0.0)))


def _drawn(box: Box, told: str, name: str, strength: float) -> str:
    letters = int((box.width - 8) / _LETTER)
    has_name = bool(name) and letters > _LEAST_LETTERS and box.height > _LINE
    text = f'<text x="{box.x + 4:.1f}" y="{box.y + 12:.1f}">{short(name, letters)}</text>' if has_name else ""
    place = f'x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}"'
    return f'<g><title>{safe(told)}</title><rect class="cell" {place} fill-opacity="{strength:.2f}"/>{text}</g>'
