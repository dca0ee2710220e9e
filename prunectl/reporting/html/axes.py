"""The frame of a plot: where a number lies, and lines to read it by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prunectl.reporting.html.text import safe

LEFT, TOP, WIDTH, HEIGHT, BELOW = 70, 12, 640, 260, 40
_LINES = 5


@dataclass(frozen=True, slots=True)
class Scale:
    """From numbers to places on a line."""

    low: float
    high: float
    begin: float
    end: float

    @classmethod
    def of(cls, values: Sequence[float], begin: float, end: float) -> Scale:
        """Return the scale on which all of these lie, with a little air."""
        low, high = min(values), max(values)
        air = (high - low or abs(high) or 1.0) * 0.04
        return cls(low - air, high + air, begin, end)

    def at(self, value: float) -> float:
        """Return the place of a number."""
        return self.begin + (value - self.low) / (self.high - self.low) * (self.end - self.begin)

    @property
    def marks(self) -> list[float]:
        """The numbers that stand at the axis."""
        return [self.low + (self.high - self.low) * part / (_LINES - 1) for part in range(_LINES)]


def across(values: Sequence[float]) -> Scale:
    """Return a scale from left to right."""
    return Scale.of(values, LEFT, LEFT + WIDTH)


def upwards(values: Sequence[float]) -> Scale:
    """Return a scale from bottom to top."""
    return Scale.of(values, TOP + HEIGHT, TOP)


def frame(x: Scale, y: Scale, names: tuple[str, str], marks: Mapping[float, str]) -> str:
    """Return the lines and the numbers of both axes, those from left to right as they are to be spelled."""
    bottom = TOP + HEIGHT
    parts = []
    for mark in y.marks:
        place = round(y.at(mark), 1)
        parts.append(f'<path class="grid" d="M{LEFT} {place:g}h{WIDTH}"/>')
        parts.append(f'<text class="dim" x="{LEFT - 6}" y="{place + 4:g}" text-anchor="end">{mark:.3g}</text>')
    for mark, word in marks.items():
        place = round(x.at(mark), 1)
        parts.append(f'<text class="dim" x="{place:g}" y="{bottom + 16}" text-anchor="middle">{safe(word)}</text>')
    parts.append(f'<text x="{LEFT + WIDTH / 2:g}" y="{bottom + 34}" text-anchor="middle">{safe(names[0])}</text>')
    parts.append(f'<text x="{LEFT}" y="{TOP - 2}">{safe(names[1])}</text>')
    return "".join(parts)


def plot(label: str, inside: str, more: int = 0) -> str:
    """Return a picture of what is inside, with room for some pixels below."""
    wide, tall = LEFT + WIDTH + 30, TOP + HEIGHT + BELOW + more
    return (
        f'<svg viewBox="0 -12 {wide} {tall + 12}" width="{wide}" role="img" aria-label="{safe(label)}">{inside}</svg>'
    )
