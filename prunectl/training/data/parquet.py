"""Tables in Parquet files, read a group of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.errors import InputError
from prunectl.formats.base import Array
from prunectl.formats.optional import require
from prunectl.training.data import columns
from prunectl.training.data.arrays import NUMERIC
from prunectl.training.data.columns import Words
from prunectl.training.data.grammar import Spec, existing
from prunectl.training.data.source import Batch, Source

ROWS_AT_ONCE = 4096


def fits(where: str) -> bool:
    """Whether a SPEC names a Parquet file."""
    return where.endswith((".parquet", ".pq"))


def open_parquet(spec: Spec) -> Source:
    """Return the source that `table.parquet?target=label&columns=a,b` means."""
    path = existing(spec.path)
    with _opened(path) as file:
        names, count = list(file.schema_arrow.names), int(file.metadata.num_rows)
    picked = columns.chosen(spec, names)
    if not count:
        raise InputError(f"{path} has no rows")
    words = {name: found for name in picked.targets if (found := _words(path, name)) is not None}

    def read() -> Iterator[Batch]:
        for table in _tables(path, [*picked.inputs, *picked.targets]):
            x = _inputs(path, table, picked.inputs)
            y = [_target(path, table, name, words) for name in picked.targets]
            yield Batch(x, columns.target(y) if y else None)

    first = next(read())
    row_bytes = (np.asarray(first.x).nbytes + 8 * len(picked.targets) * len(first.x)) // len(first.x)
    return columns.as_source(spec, read, words, count, row_bytes * count)


def _opened(path: Path) -> Any:
    parquet = require("pyarrow.parquet", extra="parquet")
    arrow = require("pyarrow", extra="parquet")
    try:
        return parquet.ParquetFile(path)
    except (arrow.ArrowInvalid, arrow.ArrowNotImplementedError) as error:
        raise InputError(f"{path} is no Parquet file that can be read: {error}") from error


def _tables(path: Path, names: list[str]) -> Iterator[Any]:
    arrow = require("pyarrow", extra="parquet")
    with _opened(path) as file:
        try:
            yield from file.iter_batches(batch_size=ROWS_AT_ONCE, columns=names)
        except (arrow.ArrowInvalid, OSError) as error:
            raise InputError(f"{path} is damaged: {error}") from error


def _inputs(path: Path, table: Any, names: tuple[str, ...]) -> Array:
    found = [_numbers(path, table.column(name), name) for name in names]
    if len(found) == 1 and found[0].ndim == 2:
        return found[0]
    lists = [name for name, one in zip(names, found, strict=True) if one.ndim > 1]
    if lists:
        raise InputError(
            f"{path}: the column {lists[0]!r} holds lists, which do not stand beside other columns",
            hint=f"choose it alone: columns={lists[0]}",
        )
    return np.stack([one.astype(np.float32) for one in found], axis=1)


def _numbers(path: Path, column: Any, name: str) -> Array:
    """Return a column as numbers; lists of one length become rows."""
    if column.null_count:
        raise InputError(f"{path}: nothing stands in {column.null_count} rows of the column {name!r}")
    types = require("pyarrow.types", extra="parquet")
    if types.is_list(column.type) or types.is_large_list(column.type) or types.is_fixed_size_list(column.type):
        lengths = np.diff(column.offsets.to_numpy()) if hasattr(column, "offsets") else None
        if lengths is not None and len(set(lengths.tolist())) > 1:
            raise InputError(f"{path}: the lists in the column {name!r} differ in length")
        flat = _numbers(path, column.flatten(), name)
        return flat.reshape(len(column), -1)
    found: Array = column.to_numpy(zero_copy_only=False)
    if found.dtype.kind not in NUMERIC:
        raise InputError(
            f"{path}: the column {name!r} holds {column.type}, and no numbers",
            hint="choose columns of numbers with columns=a,b",
        )
    return found


def _words(path: Path, name: str) -> Array | None:
    """Return the classes that a target names; None if it consists of numbers."""
    seen: set[str] = set()
    for table in _tables(path, [name]):
        column = _plain(table.column(name))
        types = require("pyarrow.types", extra="parquet")
        if not (types.is_string(column.type) or types.is_large_string(column.type)):
            return None
        if column.null_count:
            raise InputError(f"{path}: nothing stands in {column.null_count} rows of the column {name!r}")
        seen.update(column.unique().to_pylist())
    return columns.known_words(str(path), name, seen)


def _target(path: Path, table: Any, name: str, words: Words) -> Array:
    column = _plain(table.column(name))
    if name in words:
        return np.searchsorted(words[name], np.array(column.to_pylist())).astype(np.int64)
    found = _numbers(path, column, name)
    return found.astype(np.float32 if found.dtype.kind == "f" else np.int64)


def _plain(column: Any) -> Any:
    """Return a column of words as words, also where the file numbers them in a dictionary."""
    types = require("pyarrow.types", extra="parquet")
    return column.dictionary_decode() if types.is_dictionary(column.type) else column
