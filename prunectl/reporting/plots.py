"""Curves drawn with dots in a terminal, and as lines in an SVG file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from prunectl.pruning.schedules import CURVES, SparsitySchedule

Curve = Sequence[float]
"""Values from 0 to 1, evenly spaced from left to right."""

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_WIDTH, _HEIGHT, _LEFT, _TOP, _LINE = 520, 260, 48, 16, 18


def braille_plot(curve: Curve, columns: int, rows: int) -> list[str]:
    """Plot a curve in Braille patterns, with two by four dots in each character."""
    width, height = columns * 2, rows * 4
    cells = [[0] * columns for _ in range(rows)]
    last: int | None = None
    for x in range(width):
        value = curve[round(x * (len(curve) - 1) / (width - 1))]
        y = round((1.0 - min(max(value, 0.0), 1.0)) * (height - 1))
        # A jump is drawn as a vertical line, not as two separate pieces.
        for dot in range(min(y, last if last is not None else y), max(y, last if last is not None else y) + 1):
            cells[dot // 4][x // 2] |= _DOTS[dot % 4][x % 2]
        last = y
    return ["".join(chr(0x2800 + cell) for cell in line).rstrip("\u2800") for line in cells]


def svg_plot(curves: Mapping[str, Curve], *, across: str, up: str) -> str:
    """Plot several curves as SVG, with a legend."""
    right = _LEFT + _WIDTH
    bottom = _TOP + _HEIGHT
    total = bottom + 40 + _LINE * len(curves)
    label = escape(f"{up} against {across}: {', '.join(curves)}")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right + 24} {total}" role="img" aria-label="{label}">',
        "<style>text { font: 13px sans-serif }</style>",
        f'<rect width="{right + 24}" height="{total}" fill="white"/>',
    ]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = bottom - share * _HEIGHT
        parts.append(f'<path d="M{_LEFT} {y:g}H{right}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:g}" text-anchor="end">{share:.0%}</text>')
    parts.append(f'<text x="{(_LEFT + right) / 2:g}" y="{bottom + 20}" text-anchor="middle">{escape(across)}</text>')
    for number, (name, curve) in enumerate(curves.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        points = " ".join(
            f"{_LEFT + x * _WIDTH / (len(curve) - 1):.1f},{bottom - value * _HEIGHT:.1f}"
            for x, value in enumerate(curve)
        )
        y = bottom + 44 + number * _LINE
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<path d="M{_LEFT} {y - 4}h24" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text x="{_LEFT + 32}" y="{y}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


_STEPS = 200
_FINAL = 0.8


def schedule_curves() -> dict[str, list[float]]:
    """The sparsity at every step, by schedule."""
    ramps = {name: SparsitySchedule(name, _FINAL, 0, _STEPS) for name in CURVES}
    return {name: [ramp.sparsity_at(step) for step in range(_STEPS + 1)] for name, ramp in ramps.items()}


def schedules_svg() -> str:
    """All built-in schedules in one SVG."""
    return svg_plot(schedule_curves(), across="steps from --begin to --end", up="sparsity")
