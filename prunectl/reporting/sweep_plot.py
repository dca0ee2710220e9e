"""The points of a sweep at a terminal: how good over how big, and the steps that no other is above."""

from __future__ import annotations

from prunectl.reporting.curve_plot import in_dots
from prunectl.reporting.table import Cell, Column, Table
from prunectl.sweeping.point import BASE, Point
from prunectl.sweeping.sweep import Swept
from prunectl.units import nbytes

_COLUMNS, _ROWS = 60, 12
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def plot(found: Swept, best: list[Point]) -> Table:
    """Return the points as letters, a letter for each way, above the steps of the front."""
    outcomes = {point: outcome for point, outcome in found.outcomes.items() if outcome.is_number}
    tried = list(dict.fromkeys(point.way for point in outcomes if point != BASE))
    sizes = [outcome.gzip for outcome in outcomes.values()]
    values = [outcome.value for outcome in outcomes.values()]
    left, wide = min(sizes), max(max(sizes) - min(sizes), 1)
    low, high = min(values), max(values)
    tall = high - low or 1.0
    is_up = found.base.is_more_better
    steps: list[float] = []
    for x in range(2 * _COLUMNS):
        size = left + x / (2 * _COLUMNS - 1) * wide
        reached = [outcomes[point].value for point in best if outcomes[point].gzip <= size]
        at = (max(reached) if is_up else min(reached)) if reached else (low if is_up else high)
        steps.append((at - low) / tall)
    grid = [list(line.ljust(_COLUMNS, "\u2800")) for line in in_dots(steps, _COLUMNS, _ROWS)]
    for point, outcome in reversed(outcomes.items()):
        column = round((outcome.gzip - left) / wide * (_COLUMNS - 1))
        row = round((high - outcome.value) / tall * (_ROWS - 1))
        letter = "=" if point == BASE else _LETTERS[tried.index(point.way) % len(_LETTERS)]
        grid[row][column] = letter.upper() if point in best else letter
    marks = [f"{high:.4g}", *[""] * (_ROWS - 2), f"{low:.4g}"]
    ends = [nbytes(size) for size in (left, left + wide)]
    names = [f"{_LETTERS[at % len(_LETTERS)]} {' '.join(filter(None, way))}" for at, way in enumerate(tried)]
    rows: list[tuple[Cell, ...]] = [(mark, "".join(line)) for mark, line in zip(marks, grid, strict=True)]
    rows.append(("gzip", f"{ends[0]}{ends[1]:>{_COLUMNS - len(ends[0])}}"))
    rows += [("", name) for name in (*names, "= as it is", "capitals: no other is as good and smaller")]
    return Table("plot", (Column(found.base.metric), Column("")), tuple(rows))
