"""Charts and pictures of a page: SVG with axes, bars, curves, Pareto fronts and treemaps, PNGs of sparsity maps."""

from __future__ import annotations

import base64
import html
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunectl.analysis.patterns import SparsityMap
from prunectl.errors import abbreviated
from prunectl.pruning.request import UNSTRUCTURED
from prunectl.reporting.report import Report, Table, Unit
from prunectl.units import Units, count, nbytes, percent, printable

_LONGEST = 46
_LONGEST_TEXT = 2000


def escape(text: str) -> str:
    """Escape a text: nothing in it opens a tag, ends an attribute or reverses the direction of what follows."""
    return html.escape(printable(abbreviated(text, _LONGEST_TEXT)))


def format_number(text: str, longest: int = _LONGEST) -> str:
    """A name escaped for a page; the middle of one that is too long is left out."""
    shown = printable(abbreviated(text, _LONGEST_TEXT))
    if len(shown) > longest:
        end = (longest - 1) // 2
        shown = f"{shown[: longest - 1 - end]}…{shown[len(shown) - end :]}"
    return html.escape(shown)


def tag(name: str, inside: str = "", **attributes: str) -> str:
    """An element around content that is escaped already."""
    attribute_text = "".join(f' {key}="{escape(value)}"' for key, value in attributes.items())
    return f"<{name}{attribute_text}>{inside}</{name}>"


LEFT, TOP, WIDTH, HEIGHT, BELOW = 70, 12, 640, 260, 40
_LINES = 5


@dataclass(frozen=True, slots=True)
class Scale:
    """A linear scale from numbers to coordinates."""

    low: float
    high: float
    begin: float
    end: float

    @classmethod
    def of(cls, values: Sequence[float], begin: float, end: float) -> Scale:
        """The scale of all values, with a small margin."""
        low, high = min(values), max(values)
        air = (high - low or abs(high) or 1.0) * 0.04
        return cls(low - air, high + air, begin, end)

    def position(self, value: float) -> float:
        """The coordinate of a number."""
        return self.begin + (value - self.low) / (self.high - self.low) * (self.end - self.begin)

    @property
    def marks(self) -> list[float]:
        """The ticks of the axis: round numbers, with steps of 1, 2 or 5 times a power of ten."""
        rough = (self.high - self.low) / _LINES
        power = 10.0 ** math.floor(math.log10(rough))
        step = power * next(size for size in (1, 2, 5, 10) if size * power >= rough)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def x_scale(values: Sequence[float]) -> Scale:
    """A scale from left to right."""
    return Scale.of(values, LEFT, LEFT + WIDTH)


def y_scale(values: Sequence[float]) -> Scale:
    """A scale from bottom to top."""
    return Scale.of(values, TOP + HEIGHT, TOP)


def axes(x: Scale, y: Scale, names: tuple[str, str], marks: Mapping[float, str]) -> str:
    """Both axes of a chart: grid lines, numbers on the y axis, and the given labels on the x axis."""
    bottom = TOP + HEIGHT
    parts = []
    for mark in y.marks:
        position = round(y.position(mark), 1)
        parts.append(f'<path class="grid" d="M{LEFT} {position:g}h{WIDTH}"/>')
        parts.append(f'<text class="dim" x="{LEFT - 6}" y="{position + 4:g}" text-anchor="end">{mark:g}</text>')
    for mark, text in marks.items():
        position = round(x.position(mark), 1)
        parts.append(f'<text class="dim" x="{position:g}" y="{bottom + 16}" text-anchor="middle">{escape(text)}</text>')
    parts.append(f'<text x="{LEFT + WIDTH / 2:g}" y="{bottom + 34}" text-anchor="middle">{escape(names[0])}</text>')
    parts.append(f'<text x="{LEFT}" y="{TOP - 2}">{escape(names[1])}</text>')
    return "".join(parts)


def chart(label: str, inside: str, more: int = 0) -> str:
    """A chart as SVG, with room for a legend below; a narrow screen scrolls it sideways."""
    wide, tall = LEFT + WIDTH + 60, TOP + HEIGHT + BELOW + more
    return _scrolling(f'<svg viewBox="0 -12 {wide} {tall + 12}" role="img" aria-label="{escape(label)}">{inside}</svg>')


def _scrolling(picture: str) -> str:
    return f'<div class="scroll">{picture}</div>'


_MAX_BARS = 1000
_BARS_WIDTH = 400


def bars(layers: Sequence[dict[str, Any]]) -> str:
    """A bar chart of the sparsity of the prunable tensors; empty if no zeros were counted."""
    known = [layer for layer in layers if layer["is_prunable"] and layer["sparsity"] is not None]
    if not known:
        return ""
    shown = known[:_MAX_BARS]
    rows = "".join(map(_bar, shown))
    left = f"<p>The table lists {count(len(known) - _MAX_BARS)} more.</p>" if len(known) > _MAX_BARS else ""
    label = f"sparsity of {count(len(shown))} prunable tensors"
    picture = f'<div class="bars">{rows}</div>'
    return f'<div class="tall" tabindex="0" role="group" aria-label="{label}">{picture}</div>{left}'


def _bar(layer: dict[str, Any]) -> str:
    """The name, a bar that scales with the screen, and the number, so that text keeps its size on any screen."""
    share = layer["sparsity"]
    length = round(share * _BARS_WIDTH, 1)
    title = f"{escape(layer['name'])}: {percent(share)} of {count(layer['params'])} weights are zero"
    return (
        f"<span>{format_number(layer['name'])}</span>"
        f'<svg viewBox="0 0 {_BARS_WIDTH} 12" preserveAspectRatio="none" role="img" aria-label="{title}">'
        f'<title>{title}</title><rect class="rest" width="{_BARS_WIDTH}" height="12"/>'
        f'<rect class="bar" width="{length:g}" height="12"/></svg><span>{escape(percent(share))}</span>'
    )


_TABLE, _SPARSITY = "epochs", "sparsity"
_COLOURS, _LEGEND_LINE, _MARKS = 6, 18, 8


def curves(report: Report) -> str:
    """Line charts of losses and metrics by epoch; empty for fewer than two epochs."""
    tables = [table for section in report.sections for table in section.tables if table.name == _TABLE]
    return "".join(_pictures(table) for table in tables if len(table.rows) > 1)


def _pictures(table: Table) -> str:
    columns = {
        column.name: index for index, column in enumerate(table.columns) if column.unit in {Unit.NUMBER, Unit.RATIO}
    }
    lines = {name: _values(table, index) for name, index in columns.items()}
    losses = {name: values for name, values in lines.items() if "loss" in name and values}
    zeros = {name: values for name, values in lines.items() if name == _SPARSITY and values}
    metrics = {name: values for name, values in lines.items() if values and name not in losses | zeros}
    return "".join(_picture(group) for group in (losses, metrics, zeros) if group)


def _values(table: Table, column: int) -> list[tuple[int, float]]:
    cells = [row[column] for row in table.rows]
    return [(epoch, float(cell)) for epoch, cell in enumerate(cells, 1) if isinstance(cell, int | float)]


def _picture(lines: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    x = x_scale([epoch for values in lines.values() for epoch, _ in values])
    y = y_scale([value for values in lines.values() for _, value in values])
    last = max(epoch for values in lines.values() for epoch, _ in values)
    marks = {float(epoch): str(epoch) for epoch in range(1, last + 1, max(round(last / _MARKS), 1))}
    inside = axes(x, y, ("epoch", ""), marks)
    top = TOP + HEIGHT + BELOW
    for number, (name, values) in enumerate(lines.items()):
        kind = f"curve c{number % _COLOURS}"
        points = " ".join(f"{x.position(epoch):.1f},{y.position(value):.1f}" for epoch, value in values)
        inside += f'<polyline class="{kind}" points="{points}"><title>{escape(name)}</title></polyline>'
        inside += f'<path class="{kind}" d="M{LEFT} {top + number * _LEGEND_LINE + 8}h24"/>'
        inside += f'<text x="{LEFT + 32}" y="{top + number * _LEGEND_LINE + 12}">{escape(name)}</text>'
    return chart(f"{', '.join(lines)} by epoch", inside, more=_LEGEND_LINE * len(lines))


def pareto(models: Sequence[dict[str, Any]], units: Units) -> str:
    """A scatter plot of the trials of a sweep with the Pareto front; empty where there is no sweep."""
    # A trial without a number cannot be drawn.
    points = [model for model in models if "point" in model and model["point"]["value"] is not None]
    if not points:
        return ""
    x = x_scale([point["bytes"]["compressed"] for point in points])
    y = y_scale([point["point"]["value"] for point in points])
    metric = points[0]["point"]["metric"]
    marks = {mark: nbytes(max(round(mark), 0), units) for mark in x.marks}
    best = sorted((point for point in points if point["point"]["is_front"]), key=_size)
    ways = list(dict.fromkeys(name for point in points if (name := _way(point))))
    inside = axes(x, y, ("gzip", metric), marks) + _steps(best, x, y)
    # Trials on the front are drawn last, over the others.
    inside += "".join(
        _dot(point, x, y, ways, units) for point in sorted(points, key=lambda one: one["point"]["is_front"])
    )
    inside += _labels(best, x, y) + _legend(ways)
    label = f"{metric} against gzip size of {len(points)} models, {len(best)} on the Pareto front"
    return chart(label, inside, more=_LEGEND_LINE * (len(ways) + 1))


def _legend(ways: Sequence[str]) -> str:
    """The legend of colours and shapes."""
    rows = []
    for number, name in enumerate(ways):
        top = TOP + HEIGHT + BELOW + number * _LEGEND_LINE
        rows.append(f'<circle class="f{number % _COLOURS}" cx="{LEFT + 12}" cy="{top + 8}" r="5"/>')
        rows.append(f'<text x="{LEFT + 32}" y="{top + 12}">{escape(name)}</text>')
    top = TOP + HEIGHT + BELOW + len(ways) * _LEGEND_LINE
    shapes = "with its sparsity: on the Pareto front; diamond: the unpruned model"
    return "".join(rows) + f'<text class="dim" x="{LEFT + 32}" y="{top + 12}">{shapes}</text>'


def _way(model: dict[str, Any]) -> str:
    """How a model was pruned, without its sparsity; empty for the unpruned one."""
    point = model["point"]
    parts = [point[key] for key in ("strategy", "scope", "schedule", "pattern", "params")]
    return " ".join(part for part in parts if part and part != UNSTRUCTURED)


def _size(point: dict[str, Any]) -> int:
    size: int = point["bytes"]["compressed"]
    return size


def _steps(best: Sequence[dict[str, Any]], x: Scale, y: Scale) -> str:
    corners = [(x.position(_size(point)), y.position(point["point"]["value"])) for point in best]
    path = f"M{corners[0][0]:.1f} {corners[0][1]:.1f}" + "".join(
        f"H{across:.1f}V{up:.1f}" for across, up in corners[1:]
    )
    return f'<path class="step" d="{path}"/>'


def _dot(model: dict[str, Any], x: Scale, y: Scale, ways: Sequence[str], units: Units) -> str:
    """A point in the colour of its method; those on the front are larger, and the unpruned model is a diamond."""
    point, way = model["point"], _way(model)
    name = f"{way} {percent(point['sparsity'])}" if way else "unpruned"
    title = escape(f"{name}: {point['metric']} {point['value']:.4g}, {nbytes(_size(model), units)}")
    across, up = round(x.position(_size(model)), 1), round(y.position(point["value"]), 1)
    if not way:
        shape = f'<path class="dense" d="M{across} {up - 7:g}l7 7l-7 7l-7 -7z"><title>{title}</title></path>'
        return f'{shape}<text x="{across}" y="{up - 10:g}" text-anchor="middle">unpruned</text>'
    kind, radius = ("best", 6) if point["is_front"] else ("dot", 4)
    colour = f"f{ways.index(way) % _COLOURS}"
    return f'<circle class="{kind} {colour}" cx="{across}" cy="{up}" r="{radius}"><title>{title}</title></circle>'


_LABEL_WIDTH, _LABEL_HEIGHT = 40, 12


def _labels(best: Sequence[dict[str, Any]], x: Scale, y: Scale) -> str:
    """The sparsities of the points on the front, without labels that would overlap."""
    placed: list[tuple[float, float]] = []
    texts = []
    for model in filter(_way, best):
        across, up = round(x.position(_size(model)) + 9, 1), round(y.position(model["point"]["value"]) + 14, 1)
        if all(abs(across - left) > _LABEL_WIDTH or abs(up - low) > _LABEL_HEIGHT for left, low in placed):
            placed.append((across, up))
            texts.append(f'<text x="{across:g}" y="{up:g}">{escape(percent(model["point"]["sparsity"]))}</text>')
    return "".join(texts)


_TREEMAP_WIDTH, _HEIGHT = 800.0, 280.0
_LEAST_SHARE = 0.0003
"""Tensors with a smaller share of the size are drawn as one box."""
_FAINT, _FULL = 0.12, 0.6
_LETTER, _TREEMAP_LINE, _LEAST_LETTERS = 6.5, 14.0, 5


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle."""

    x: float
    y: float
    width: float
    height: float


def treemap(layers: Sequence[dict[str, Any]], units: Units) -> str:
    """A treemap of the sizes of all tensors; empty if there are none."""
    sized = sorted((layer for layer in layers if layer["bytes"] and not layer["tied_to"]), key=lambda it: -it["bytes"])
    total = sum(layer["bytes"] for layer in sized)
    if not total:
        return ""
    shown = [layer for layer in sized if layer["bytes"] >= _LEAST_SHARE * total]
    rest = sized[len(shown) :]
    sizes = [layer["bytes"] for layer in shown] + ([sum(layer["bytes"] for layer in rest)] if rest else [])
    boxes = squarify(sizes, Box(0.0, 0.0, _TREEMAP_WIDTH, _HEIGHT))
    cells = [_cell(layer, box, units) for layer, box in zip(shown, boxes, strict=False)]
    if rest:
        cells.append(
            _draw_cell(boxes[-1], f"{count(len(rest))} smaller tensors: {nbytes(sizes[-1], units)}", "", _FAINT)
        )
    label = f"size of {count(len(sized))} tensors, {nbytes(total, units)} in total"
    view = f'viewBox="0 0 {_TREEMAP_WIDTH:g} {_HEIGHT:g}"'
    return _scrolling(f'<svg {view} role="img" aria-label="{escape(label)}">{"".join(cells)}</svg>')


def squarify(sizes: Sequence[float], box: Box) -> list[Box]:
    """Lay out a squarified treemap (Bruls, Huizing, van Wijk 2000): one box for each of the descending sizes."""
    scale = box.width * box.height / sum(sizes)
    areas = [size * scale for size in sizes]
    boxes: list[Box] = []
    while areas:
        side = min(box.width, box.height)
        length = 1
        while length < len(areas) and _worst(areas[: length + 1], side) <= _worst(areas[:length], side):
            length += 1
        strip, areas = areas[:length], areas[length:]
        row, box = _lay_out_strip(strip, box)
        boxes += row
    return boxes


def _worst(areas: Sequence[float], side: float) -> float:
    """The worst aspect ratio among the boxes of a strip along a side."""
    total = sum(areas)
    return max(side * side * areas[0] / (total * total), total * total / (side * side * areas[-1]))


def _lay_out_strip(strip: Sequence[float], box: Box) -> tuple[list[Box], Box]:
    """Lay out a strip along the shorter side; return its boxes, and the rest of the box."""
    width = sum(strip) / min(box.width, box.height)
    lengths = [area / width for area in strip]
    runs = list(zip(accumulate(lengths, initial=0.0), lengths, strict=False))
    if box.width >= box.height:
        rest = Box(box.x + width, box.y, max(box.width - width, 1e-9), box.height)
        return [Box(box.x, box.y + offset, width, length) for offset, length in runs], rest
    rest = Box(box.x, box.y + width, box.width, max(box.height - width, 1e-9))
    return [Box(box.x + offset, box.y, length, width) for offset, length in runs], rest


def _cell(layer: dict[str, Any], box: Box, units: Units) -> str:
    sparsity = layer["sparsity"]
    title = f"{layer['name']}: {nbytes(layer['bytes'], units)}"
    title += f", {percent(sparsity)} zero" if sparsity is not None else ""
    return _draw_cell(box, title, layer["name"], _FAINT + (_FULL - _FAINT) * (1 - (sparsity or 0.0)))


def _draw_cell(box: Box, title: str, name: str, strength: float) -> str:
    letters = int((box.width - 8) / _LETTER)
    has_name = bool(name) and letters > _LEAST_LETTERS and box.height > _TREEMAP_LINE
    text = f'<text x="{box.x + 4:.1f}" y="{box.y + 12:.1f}">{format_number(name, letters)}</text>' if has_name else ""
    geometry = f'x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}"'
    return f'<g><title>{escape(title)}</title><rect class="cell" {geometry} fill-opacity="{strength:.2f}"/>{text}</g>'


LEVELS = 16
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_BITS, _PALETTE = 4, 3
Color = tuple[int, int, int]


def data_uri(levels: NDArray[np.uint8], colors: Sequence[Color]) -> str:
    """A PNG of levels from 0 to 15 as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(png(levels, colors)).decode()}"


def png(levels: NDArray[np.uint8], colors: Sequence[Color]) -> bytes:
    """Encode a PNG with 4 bits a pixel and a palette."""
    tall, wide = levels.shape
    even = np.pad(levels, ((0, 0), (0, wide % 2)))
    # Two pixels in a byte, the left one in the high bits; each line begins with its filter type, 0 for none.
    lines = np.pad(even[:, ::2] << _BITS | even[:, 1::2], ((0, 0), (1, 0)))
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", wide, tall, _BITS, _PALETTE, 0, 0, 0)),
        (b"PLTE", bytes(part for color in colors for part in color)),
        (b"IDAT", zlib.compress(lines.astype(np.uint8).tobytes(), 9)),
        (b"IEND", b""),
    )
    return _SIGNATURE + b"".join(_chunk(name, data) for name, data in parts)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


_PIXELS, _MIN_SIDE, _MAX_SIDE = 4, 24, 256
"""Pixels for a field, and the least and the most pixels for a side."""
_KEPT, _ZERO = (11, 107, 203), (233, 237, 241)


def _blend(share: float) -> Color:
    red, green, blue = (round(kept + (zero - kept) * share) for kept, zero in zip(_KEPT, _ZERO, strict=True))
    return red, green, blue


COLORS = tuple(_blend(level / (LEVELS - 1)) for level in range(LEVELS))
"""The colours from kept (0) to zero (15)."""


def draw_sparsity_maps(maps: Sequence[SparsityMap]) -> str:
    """Pictures of the zeros; empty if there are no maps."""
    if not maps:
        return ""
    legend = "Blue weights are kept, pale ones are zero. Rows are outputs, columns are inputs."
    return f'<p>{legend}</p><div class="masks">{"".join(map(_figure, maps))}</div>'


def quantise(sparsity_map: SparsityMap) -> NDArray[np.uint8]:
    """The share of zeros in each field, from 0 to 15; 0 and 15 mean exactly none and all."""
    share = np.rint(sparsity_map.zeros * (LEVELS - 1) / sparsity_map.sizes).astype(np.int64)
    inner = np.clip(share, 1, LEVELS - 2)
    return np.where(
        sparsity_map.zeros == 0, 0, np.where(sparsity_map.zeros == sparsity_map.sizes, LEVELS - 1, inner)
    ).astype(np.uint8)


def describe_map(sparsity_map: SparsityMap) -> str:
    """Describe a sparsity map in words."""
    rows = "row" if sparsity_map.empty_rows == 1 else "rows"
    empty = f"; {count(sparsity_map.empty_rows)} empty {rows}" if sparsity_map.empty_rows else ""
    return f"{percent(sparsity_map.share)} zero{empty}"


def _figure(sparsity_map: SparsityMap) -> str:
    levels = quantise(sparsity_map)
    height, width = (min(max(side * _PIXELS, _MIN_SIDE), _MAX_SIDE) for side in levels.shape)
    alt = (
        f"{sparsity_map.name}, {count(sparsity_map.rows)} x {count(sparsity_map.columns)}: {describe_map(sparsity_map)}"
    )
    image = f'<img src="{data_uri(levels, COLORS)}" width="{width}" height="{height}" alt="{escape(alt)}">'
    caption = f"{format_number(sparsity_map.name)}<br>{escape(describe_map(sparsity_map))}"
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
