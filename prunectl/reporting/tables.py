"""A table on a terminal: which of its columns fit, how wide they are, and how a name that does not fit is shortened."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING

from prunectl.reporting.report import Column, Settings, Table
from prunectl.units import count

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_GAP = 2
_COMFORTABLE, _NARROWEST = 24, 12
"""The least width of a column of text while optional columns remain, and once only the others are left."""


def print_table(table: Table, console: Console, settings: Settings, rows: int) -> None:
    """Print a table as wide as the console allows; without a number of rows, all of them."""
    from rich.table import Table as RichTable  # noqa: PLC0415 - rich is loaded only for people

    shown = table.rows[:rows] if rows else table.rows
    lines = [
        [column.format(cell, settings.units) for column, cell in zip(table.columns, row, strict=True)]
        for row in (*shown, *([table.total] if table.total else []))
    ]
    widths, hidden = fit_columns(table, lines, console.width)
    rich = RichTable(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, header_style="dim", title_justify="left")
    cells = []
    for number, width in widths.items():
        column = table.columns[number]
        justify = "right" if column.is_number else "left"
        rich.add_column(column.heading, justify=justify, width=width)  # type: ignore[arg-type]
        cells.append(shorten_all([line[number] for line in lines], width))
    for number, line in enumerate(zip(*cells, strict=True)):
        is_total = table.total is not None and number == len(lines) - 1
        named = (_colored(table.columns[column], cell) for column, cell in zip(widths, line, strict=True))
        rich.add_row(*named, style="bold" if is_total else None)
    console.print(rich)
    under = []
    if left := len(table.rows) - len(shown):
        under.append(f"{count(left)} more {'row' if left == 1 else 'rows'}: -n 0 shows all")
    if hidden:
        under.append(
            f"Not shown at {console.width} columns: {', '.join(hidden)}. "
            "Use a wider terminal, --format markdown or --json."
        )
    if table.note:
        under.append(table.note)
    for text in under:
        for part in wrap(text, max(console.width - 2, 20), break_on_hyphens=False):
            console.print(f"  {part}", style="dim", soft_wrap=True)


_VERDICT_STYLES = {"pass": "green", "warn": "yellow", "FAIL": "bold red"}


def _colored(column: Column, cell: str) -> Text:
    from rich.text import Text  # noqa: PLC0415 - see above

    return Text(cell, _VERDICT_STYLES.get(cell, "") if column.name == "verdict" else "")


def fit_columns(table: Table, lines: Sequence[Sequence[str]], width: int) -> tuple[dict[int, int], list[str]]:
    """The columns that fit, each with its width, and the headings of the others in the order of their removal.

    Optional columns are removed from the last to the first, then the others in the same order, but never the first
    column. Text is shortened or wrapped before that, as long as it stays readable.
    """
    everything = range(len(table.columns))
    longest = [max((_cells(line[number]) for line in lines), default=1) for number in everything]
    heads = [table.columns[number].heading for number in everything]
    full = [max(longest[number], _cells(heads[number]), 1) for number in everything]

    def least(number: int, text: int) -> int:
        # A heading of several words may take several lines.
        word = max(map(_cells, heads[number].split()), default=1)
        column = table.columns[number]
        return max(longest[number] if column.is_number or column.is_whole else min(longest[number], text), word, 1)

    # An optional column without a value is left out at any width.
    shown = [number for number in everything if longest[number] or not table.columns[number].is_optional]
    hidden = []
    optional = [number for number in reversed(shown) if table.columns[number].is_optional]
    others = [number for number in reversed(shown) if number not in optional and number]
    for text, candidates in ((_COMFORTABLE, optional), (_NARROWEST, others)):
        for number in candidates:
            if _fits((least(number, text) for number in shown), width):
                break
            shown.remove(number)
            hidden.append(heads[number])
        needs = {number: least(number, text) for number in shown}
        if _fits(needs.values(), width):
            break
    spare = max(width - sum(needs.values()) - _GAP * (len(shown) - 1), 0)
    words = [max((_cells(word) for line in lines for word in line[number].split()), default=0) for number in everything]
    # Columns first get room for their longest words, then for whole cells: narrow ones in full, others share the rest.
    for wanted in (words, full):
        missing = {number: max(wanted[number] - needs[number], 0) for number in shown}
        for place, number in enumerate(sorted(shown, key=lambda number: missing[number])):
            more = min(spare // (len(shown) - place), missing[number])
            needs[number] += more
            spare -= more
    return {number: min(need, width) for number, need in needs.items()}, hidden


def _fits(widths: Iterable[int], width: int) -> bool:
    listed = list(widths)
    return sum(listed) + _GAP * (len(listed) - 1) <= width


def _cells(text: str) -> int:
    """The width of a text on a terminal, where some characters take two cells."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len  # noqa: PLC0415 - see above

    return cell_len(text)


_PLACES = 12


def shorten_all(texts: Sequence[str], width: int) -> list[str]:
    """Texts shortened so that no word is wider than `width`; texts that differ stay different where possible."""
    short = {text: _shorten_words(text, width) for text in texts}
    uses = Counter(short.values())
    clashing = [text for text, result in short.items() if uses[result] > 1 and " " not in text]
    if clashing:
        others = {short[text] for text in short.keys() - set(clashing)}
        best = 0
        # All names are cut in the same place first, which is enough for most.
        places = range(0, width, max(width // _PLACES, 1))
        for begin in sorted(places, key=lambda place: abs(place - width // 3)):
            cut = {text: _without_letters(text, width, begin) for text in clashing}
            distinct = len({*cut.values()} - others)
            if distinct > best:
                best, short = distinct, {**short, **cut}
            if best == len(clashing):
                break
    return [short[text] for text in texts]


def _shorten_words(text: str, width: int) -> str:
    if _cells(text) <= width:
        return text
    return " ".join(shorten(word, width) for word in text.split(" "))


_PART = re.compile(r"[^./]+")
_DIGIT = re.compile(r"\d")
_MOST_PARTS = 16
_CHEAP, _FIRST = 1, 2


def shorten(name: str, width: int) -> str:
    """A name with an ellipsis in place of its least informative part.

    That is a run of whole parts (`model…0.mlp.down_proj.weight`), but not the last two, which name the tensor, and no
    part with a number, which names the layer; else letters in the middle.
    """
    if _cells(name) <= width:
        return name
    shortened = _without_parts(name, width)
    if shortened is not None:
        return shortened
    return _without_letters(name, width, width // 3)


def _without_letters(name: str, width: int, begin: int) -> str:
    """A name without its middle, from the index `begin` on."""
    if _cells(name) <= width:
        return name
    for length in range(width - 1, -1, -1):
        head = min(begin, length)
        short = f"{name[:head]}…{name[len(name) - length + head :]}"
        if _cells(short) <= width:
            return short
    return ""


def _without_parts(name: str, width: int) -> str | None:
    parts = list(_PART.finditer(name))[: _MOST_PARTS + 1]
    if not 3 <= len(parts) <= _MOST_PARTS:
        return None
    best: tuple[int, int, int] | None = None
    numbered = [_DIGIT.search(part.group()) is not None for part in parts]
    for first in range(len(parts) - 2):
        cost = 0
        begin = parts[first - 1].end() if first else 0
        for last in range(first, len(parts) - 2):
            if numbered[last]:
                break
            cost += _CHEAP if last else _FIRST
            end = parts[last + 1].start()
            choice = (cost, end - begin, begin)
            if _cells(name[:begin]) + 1 + _cells(name[end:]) <= width and (best is None or choice < best):
                best = choice
    if best is not None:
        _, gone, begin = best
        return f"{name[:begin]}…{name[begin + gone :]}"
    return _without_most_parts(name, parts, width)


def _without_most_parts(name: str, parts: list[re.Match[str]], width: int) -> str | None:
    """The parts with numbers and the last two parts, and the first if there is room: `model…0…7.w1.weight`."""
    for begins in (1, 0):
        kept = [
            place
            for place, part in enumerate(parts)
            if place < begins or place >= len(parts) - 2 or _DIGIT.search(part.group())
        ]
        short, end = "", 0
        for before, place in zip((-1, *kept), kept, strict=False):
            # Adjacent parts keep the separator between them, and the first part keeps the text before it.
            begin = end if place == before + 1 else parts[place].start()
            short += ("" if place == before + 1 else "…") + name[begin : parts[place].end()]
            end = parts[place].end()
        short += name[end:]
        if _cells(short) <= width:
            return short
    return None
