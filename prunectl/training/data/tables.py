"""CSV and Parquet tables: which columns are inputs or targets, and how text columns become class labels."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prunectl.errors import InputError, UsageError
from prunectl.formats.base import Array
from prunectl.formats.safe_json import require
from prunectl.training.data.readers import NUMERIC, IterableSource, chunked, from_arrays
from prunectl.training.data.source import Batch, Source, as_tuple, concatenate
from prunectl.training.data.spec import DataSpec, require_path

HELD_BYTES = 64 << 20
"""The maximum size of a table that is held in memory, so that its rows can be shuffled completely."""
MAX_CLASSES = 100_000
_LISTED = 5
ClassNames = Mapping[str, Array]
"""The sorted class names of each text target; a label is the index of its name."""


@dataclass(frozen=True, slots=True)
class TableColumns:
    """The columns of a table that are read."""

    inputs: tuple[str, ...]
    targets: tuple[str, ...]


def select_columns(spec: DataSpec, names: Sequence[str]) -> TableColumns:
    """The columns that the options select; by default all but the targets are inputs."""
    targets = spec.list_option("target")
    inputs = spec.list_option("columns") or tuple(name for name in names if name not in targets)
    for name in (*targets, *inputs):
        if name not in names:
            raise UsageError(
                f"{spec.where} has no column {name!r}",
                did_you_mean=tuple(get_close_matches(name, names)),
                hint=f"columns: {_shorten(names)}",
            )
        if list(names).count(name) > 1:
            raise InputError(f"{spec.where} has two columns called {name!r}")
    if not inputs:
        raise UsageError(f"{spec.where} has no column but its target")
    if both := set(inputs) & set(targets):
        raise UsageError(f"the column {min(both)!r} is named both as an input and as a target")
    return TableColumns(inputs, targets)


def as_source(
    spec: DataSpec, read: Callable[[], Iterator[Batch]], class_names: ClassNames, count: int, nbytes: int
) -> Source:
    """A source of a table of ``count`` rows: held in memory if ``nbytes`` is small, else streamed."""
    notes = tuple(
        f"{spec.where}: {name} has {len(known)} classes, numbered by name: {_number_names(known)}"
        for name, known in class_names.items()
    )
    has_targets = bool(spec.list_option("target"))
    stream = IterableSource(spec.text, count, has_targets, read, notes=notes)
    if nbytes > HELD_BYTES or not count:
        return stream
    table = concatenate(list(stream.read()))
    y = {} if table.y is None else {"the targets": as_tuple(table.y)[0]}
    return from_arrays(spec.text, {"the columns": as_tuple(table.x)[0]}, y, *notes)


def class_names_of(where: str, name: str, values: set[str]) -> Array:
    """The sorted class names in a text column."""
    if len(values) > MAX_CLASSES:
        raise InputError(f"{where}: {name} has more than {MAX_CLASSES:,} different values, too many for classes")
    return np.array(sorted(values))


def is_number(text: str) -> bool:
    """Whether a text is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def stack_targets(columns: Sequence[Array]) -> Array:
    """Target columns as one array; a single column keeps its dtype, several become float32."""
    if len(columns) == 1:
        return columns[0]
    return np.stack([column.astype(np.float32) for column in columns], axis=1)


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")


def _number_names(known: Array) -> str:
    names = ", ".join(f"{number} {name}" for number, name in enumerate(known[:_LISTED]))
    return names + (", ..." if len(known) > _LISTED else "")


CSV_ROWS_AT_ONCE = 1024
_WHOLE_DIGITS = 18
"""Every integer of up to this many characters fits into 64 bits."""


class Row(NamedTuple):
    """A row, and the number of the line on which it ends."""

    line: int
    cells: list[str]


class CsvSummary(NamedTuple):
    """The result of a first pass over all rows."""

    rows: int
    words: ClassNames
    whole: frozenset[str]
    """Targets of which all values are integers."""


def open_csv(spec: DataSpec, *_: object) -> Source:
    """Open `table.csv?target=label&columns=a,b`."""
    path = require_path(spec.path)
    names = _header(path)
    picked = select_columns(spec, names)
    scan = _scan(path, names, picked)
    if not scan.rows:
        raise InputError(f"{path} has a header and no rows")

    def read() -> Iterator[Batch]:
        for rows in chunked(_rows(path, len(names)), CSV_ROWS_AT_ONCE):
            x = np.stack([_floats(path, rows, names.index(name), name) for name in picked.inputs], axis=1)
            y = [_csv_target(path, rows, names.index(name), name, scan) for name in picked.targets]
            yield Batch(x, stack_targets(y) if y else None)

    nbytes = scan.rows * (4 * len(picked.inputs) + 8 * len(picked.targets))
    return as_source(spec, read, scan.words, scan.rows, nbytes)


def _header(path: Path) -> list[str]:
    for row in _records(path):
        names = [name.strip() for name in row.cells]
        numbers = [str(number) for number in range(len(names))]
        if all(map(is_number, names)) and names != numbers:
            raise InputError(
                f"{path} has no header: its first line holds numbers",
                hint="put the names of the columns into the first line",
            )
        return names
    raise InputError(f"{path} is empty")


def _scan(path: Path, names: Sequence[str], picked: TableColumns) -> CsvSummary:
    """Count the rows, and infer the types of the targets."""
    rows = 0
    values: dict[str, set[str]] = {name: set() for name in picked.targets}
    is_words = dict.fromkeys(picked.targets, False)
    is_whole = dict.fromkeys(picked.targets, True)
    columns = {name: names.index(name) for name in picked.targets}
    for row in _rows(path, len(names)):
        rows += 1
        for name, column in columns.items():
            text = row.cells[column].strip()
            if not text:
                raise _empty_cell(path, row, name)
            # A continuous target has as many distinct values as rows, so the set of values is limited.
            if len(values[name]) <= MAX_CLASSES:
                values[name].add(text)
            is_words[name] = is_words[name] or not is_number(text)
            is_whole[name] = is_whole[name] and len(text) <= _WHOLE_DIGITS and text.lstrip("+-").isdecimal()
    class_names = {name: class_names_of(str(path), name, values[name]) for name in columns if is_words[name]}
    return CsvSummary(rows, class_names, frozenset(name for name in columns if is_whole[name]))


def _csv_target(path: Path, rows: Sequence[Row], column: int, name: str, scan: CsvSummary) -> Array:
    if name in scan.words:
        cells = np.array([row.cells[column].strip() for row in rows])
        return np.searchsorted(scan.words[name], cells).astype(np.int64)
    if name in scan.whole:
        return np.array([int(row.cells[column]) for row in rows], np.int64)
    return _floats(path, rows, column, name)


def _floats(path: Path, rows: Sequence[Row], column: int, name: str) -> Array:
    try:
        return np.array([float(row.cells[column]) for row in rows], np.float32)
    except ValueError:
        bad = next(row for row in rows if not is_number(row.cells[column]))
        if not bad.cells[column].strip():
            raise _empty_cell(path, bad, name) from None
        raise InputError(
            f"{path}, line {bad.line}: {bad.cells[column]!r} in column {name!r} is not a number",
            hint=f"select columns of numbers: '{path}?target=label&columns=a,b'",
        ) from None


def _empty_cell(path: Path, row: Row, name: str) -> InputError:
    return InputError(f"{path}, line {row.line}: the column {name!r} is empty", hint="fill in or remove such rows")


def _rows(path: Path, width: int) -> Iterator[Row]:
    """Yield the rows after the header."""
    records = _records(path)
    next(records)
    for row in records:
        if len(row.cells) != width:
            raise InputError(f"{path}, line {row.line}: the row has {len(row.cells)} cells, the header {width}")
        yield row


def _records(path: Path) -> Iterator[Row]:
    """Yield all rows that are not blank, the header first."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=_separator(path), strict=True)
            for cells in reader:
                if cells:
                    yield Row(reader.line_num, cells)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is not a text table: {error}") from error


def _separator(path: Path) -> str:
    """The delimiter: a tab in .tsv, else the most frequent candidate in the header."""
    if path.suffix == ".tsv":
        return "\t"
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = file.readline()
    return max((",", ";", "\t"), key=header.count)


PARQUET_ROWS_AT_ONCE = 4096


def open_parquet(spec: DataSpec, *_: object) -> Source:
    """Open `table.parquet?target=label&columns=a,b`."""
    path = require_path(spec.path)
    with _open_file(path) as file:
        names, count = list(file.schema_arrow.names), int(file.metadata.num_rows)
    picked = select_columns(spec, names)
    if not count:
        raise InputError(f"{path} has no rows")
    class_names = {
        name: names_of_column for name in picked.targets if (names_of_column := _text_classes(path, name)) is not None
    }

    def read() -> Iterator[Batch]:
        for table in _tables(path, [*picked.inputs, *picked.targets]):
            x = _inputs(path, table, picked.inputs)
            y = [_parquet_target(path, table, name, class_names) for name in picked.targets]
            yield Batch(x, stack_targets(y) if y else None)

    first = next(read())
    row_bytes = (np.asarray(first.x).nbytes + 8 * len(picked.targets) * len(first.x)) // len(first.x)
    return as_source(spec, read, class_names, count, row_bytes * count)


def _open_file(path: Path) -> Any:
    parquet = require("pyarrow.parquet", extra="parquet")
    arrow = require("pyarrow", extra="parquet")
    try:
        return parquet.ParquetFile(path)
    except (arrow.ArrowInvalid, arrow.ArrowNotImplementedError) as error:
        raise InputError(f"{path} cannot be read as Parquet: {error}") from error


def _tables(path: Path, names: list[str]) -> Iterator[Any]:
    arrow = require("pyarrow", extra="parquet")
    with _open_file(path) as file:
        try:
            yield from file.iter_batches(batch_size=PARQUET_ROWS_AT_ONCE, columns=names)
        except (arrow.ArrowInvalid, OSError) as error:
            raise InputError(f"{path} is damaged: {error}") from error


def _inputs(path: Path, table: Any, names: tuple[str, ...]) -> Array:
    columns = [_numbers(path, table.column(name), name) for name in names]
    if len(columns) == 1 and columns[0].ndim == 2:
        return columns[0]
    lists = [name for name, column in zip(names, columns, strict=True) if column.ndim > 1]
    if lists:
        raise InputError(
            f"{path}: the column {lists[0]!r} holds lists, which cannot be combined with other columns",
            hint=f"select only this column: columns={lists[0]}",
        )
    return np.stack([column.astype(np.float32) for column in columns], axis=1)


def _numbers(path: Path, column: Any, name: str) -> Array:
    """A column as numbers; lists of equal length become a 2-D array."""
    if column.null_count:
        raise InputError(f"{path}: the column {name!r} is empty in {column.null_count} rows")
    types = require("pyarrow.types", extra="parquet")
    if types.is_list(column.type) or types.is_large_list(column.type) or types.is_fixed_size_list(column.type):
        lengths = np.diff(column.offsets.to_numpy()) if hasattr(column, "offsets") else None
        if lengths is not None and len(set(lengths.tolist())) > 1:
            raise InputError(f"{path}: the lists in the column {name!r} differ in length")
        flat = _numbers(path, column.flatten(), name)
        return flat.reshape(len(column), -1)
    numbers: Array = column.to_numpy(zero_copy_only=False)
    if numbers.dtype.kind not in NUMERIC:
        raise InputError(
            f"{path}: the column {name!r} holds {column.type}, not numbers",
            hint="select columns of numbers with columns=a,b",
        )
    return numbers


def _text_classes(path: Path, name: str) -> Array | None:
    """The class names of a text target; None for a numeric one."""
    values: set[str] = set()
    for table in _tables(path, [name]):
        column = _decoded(table.column(name))
        types = require("pyarrow.types", extra="parquet")
        if not (types.is_string(column.type) or types.is_large_string(column.type)):
            return None
        if column.null_count:
            raise InputError(f"{path}: the column {name!r} is empty in {column.null_count} rows")
        values.update(column.unique().to_pylist())
    return class_names_of(str(path), name, values)


def _parquet_target(path: Path, table: Any, name: str, class_names: ClassNames) -> Array:
    column = _decoded(table.column(name))
    if name in class_names:
        return np.searchsorted(class_names[name], np.array(column.to_pylist())).astype(np.int64)
    numbers = _numbers(path, column, name)
    return numbers.astype(np.float32 if numbers.dtype.kind == "f" else np.int64)


def _decoded(column: Any) -> Any:
    """Decode a dictionary-encoded column."""
    types = require("pyarrow.types", extra="parquet")
    return column.dictionary_decode() if types.is_dictionary(column.type) else column
