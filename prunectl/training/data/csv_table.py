"""Tables in text files: a header, then rows of numbers; a column of words may be the target."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from prunectl.errors import InputError
from prunectl.formats.base import Array
from prunectl.training.data import columns
from prunectl.training.data.columns import Columns, Words
from prunectl.training.data.grammar import Spec, existing
from prunectl.training.data.source import Batch, Source
from prunectl.training.data.stream import in_pieces

ROWS_AT_ONCE = 1024
_WHOLE_DIGITS = 18
"""What a 64-bit integer holds for sure."""


class Row(NamedTuple):
    """One row, and the line on which it ends."""

    line: int
    cells: list[str]


class Scan(NamedTuple):
    """What a first look at every row tells."""

    rows: int
    words: Words
    whole: frozenset[str]
    """Targets that consist of whole numbers."""


def fits(where: str) -> bool:
    """Whether a SPEC names a table of text."""
    return where.endswith((".csv", ".tsv"))


def open_csv(spec: Spec) -> Source:
    """Return the source that `table.csv?target=label&columns=a,b` means."""
    path = existing(spec.path)
    names = _header(path)
    picked = columns.chosen(spec, names)
    scan = _scan(path, names, picked)
    if not scan.rows:
        raise InputError(f"{path} has a header and no rows")

    def read() -> Iterator[Batch]:
        for rows in in_pieces(_rows(path, len(names)), ROWS_AT_ONCE):
            x = np.stack([_floats(path, rows, names.index(name), name) for name in picked.inputs], axis=1)
            y = [_target(path, rows, names.index(name), name, scan) for name in picked.targets]
            yield Batch(x, columns.target(y) if y else None)

    nbytes = scan.rows * (4 * len(picked.inputs) + 8 * len(picked.targets))
    return columns.as_source(spec, read, scan.words, scan.rows, nbytes)


def _header(path: Path) -> list[str]:
    for row in _records(path):
        names = [name.strip() for name in row.cells]
        numbers = [str(number) for number in range(len(names))]
        if all(map(columns.is_number, names)) and names != numbers:
            raise InputError(f"{path} begins with numbers, and not with a header", hint="its first line names columns")
        return names
    raise InputError(f"{path} is empty")


def _scan(path: Path, names: Sequence[str], picked: Columns) -> Scan:
    """Return how many rows there are, and what the targets consist of."""
    rows = 0
    values: dict[str, set[str]] = {name: set() for name in picked.targets}
    is_words = dict.fromkeys(picked.targets, False)
    is_whole = dict.fromkeys(picked.targets, True)
    places = {name: names.index(name) for name in picked.targets}
    for row in _rows(path, len(names)):
        rows += 1
        for name, place in places.items():
            word = row.cells[place].strip()
            if not word:
                raise _missing(path, row, name)
            # A target of continuous numbers has as many values as rows: only words are worth remembering.
            if len(values[name]) <= columns.MAX_CLASSES:
                values[name].add(word)
            is_words[name] = is_words[name] or not columns.is_number(word)
            is_whole[name] = is_whole[name] and len(word) <= _WHOLE_DIGITS and word.lstrip("+-").isdecimal()
    words = {name: columns.known_words(str(path), name, values[name]) for name in places if is_words[name]}
    return Scan(rows, words, frozenset(name for name in places if is_whole[name]))


def _target(path: Path, rows: Sequence[Row], place: int, name: str, scan: Scan) -> Array:
    if name in scan.words:
        cells = np.array([row.cells[place].strip() for row in rows])
        return np.searchsorted(scan.words[name], cells).astype(np.int64)
    if name in scan.whole:
        return np.array([int(row.cells[place]) for row in rows], np.int64)
    return _floats(path, rows, place, name)


def _floats(path: Path, rows: Sequence[Row], place: int, name: str) -> Array:
    try:
        return np.array([float(row.cells[place]) for row in rows], np.float32)
    except ValueError:
        bad = next(row for row in rows if not columns.is_number(row.cells[place]))
        if not bad.cells[place].strip():
            raise _missing(path, bad, name) from None
        raise InputError(
            f"{path}, line {bad.line}: {bad.cells[place]!r} in column {name!r} is no number",
            hint=f"choose columns of numbers, as in '{path}?target=label&columns=a,b'",
        ) from None


def _missing(path: Path, row: Row, name: str) -> InputError:
    return InputError(f"{path}, line {row.line}: nothing stands in column {name!r}", hint="fill in or drop such rows")


def _rows(path: Path, width: int) -> Iterator[Row]:
    """Yield the rows behind the header."""
    records = _records(path)
    next(records)
    for row in records:
        if len(row.cells) != width:
            raise InputError(f"{path}, line {row.line}: a row of {len(row.cells)} cells under a header of {width}")
        yield row


def _records(path: Path) -> Iterator[Row]:
    """Yield every line that is not blank, the header first."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=_separator(path), strict=True)
            for cells in reader:
                if cells:
                    yield Row(reader.line_num, cells)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is no table of text: {error}") from error


def _separator(path: Path) -> str:
    """Return what stands between cells: a tab in .tsv, else what the header has more of."""
    if path.suffix == ".tsv":
        return "\t"
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = file.readline()
    return max((",", ";", "\t"), key=header.count)
