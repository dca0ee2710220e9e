"""FlatBuffers: tables and where their fields lie, without a schema and without trust in any offset."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prunectl.formats import budgets

OFFSET_BYTES = 4


class FlatBufferError(ValueError):
    """The bytes are not a FlatBuffer."""


@dataclass(frozen=True, slots=True)
class Vector:
    """The elements of a vector."""

    begin: int
    count: int


@dataclass(frozen=True, slots=True)
class FlatTable:
    """A table: fields that are found through a vtable, by their number."""

    data: memoryview
    at: int
    vtable: int
    vtable_bytes: int
    table_bytes: int

    def number(self, field: int, nbytes: int, *, default: int = 0, is_signed: bool = False) -> int:
        """A whole number, or its default if the table leaves it out."""
        at = self._find(field, nbytes)
        return default if at == 0 else int.from_bytes(self.data[at : at + nbytes], "little", signed=is_signed)

    def child(self, field: int) -> FlatTable | None:
        """The table that a field points to."""
        at = self._find(field, OFFSET_BYTES)
        return None if at == 0 else table_at(self.data, _follow(self.data, at))

    def run(self, field: int, item_bytes: int) -> Vector:
        """Where the elements of a vector lie; an absent vector is empty."""
        at = self._find(field, OFFSET_BYTES)
        if at == 0:
            return Vector(0, 0)
        begin = _follow(self.data, at)
        count = _number_at(self.data, begin, 4)
        if begin + 4 + count * item_bytes > len(self.data):
            raise FlatBufferError(f"a vector of {count} elements reaches past its end")
        return Vector(begin + 4, count)

    def children(self, field: int, limit: int) -> tuple[FlatTable, ...]:
        """The tables in a vector, refusing more than ``limit``."""
        run = self.run(field, OFFSET_BYTES)
        if run.count > limit:
            raise FlatBufferError(f"a vector of {run.count} tables, more than any model has")
        places = range(run.begin, run.begin + OFFSET_BYTES * run.count, OFFSET_BYTES)
        return tuple(table_at(self.data, _follow(self.data, at)) for at in places)

    def numbers(self, field: int, dtype: type[np.generic], limit: int | None = None) -> NDArray[np.int64]:
        """The numbers in a vector, or as many of the first as ``limit`` says."""
        kind = np.dtype(dtype).newbyteorder("<")
        run = self.run(field, kind.itemsize)
        count = run.count if limit is None else min(limit, run.count)
        return np.frombuffer(self.data, kind, count, run.begin).astype(np.int64) if count else np.zeros(0, np.int64)

    def text(self, field: int) -> str:
        """A string."""
        run = self.run(field, 1)
        if run.count > budgets.MAX_NAME_BYTES:
            raise FlatBufferError(f"a name of {run.count} bytes")
        return str(self.data[run.begin : run.begin + run.count], "utf-8", "backslashreplace")

    def _find(self, field: int, nbytes: int) -> int:
        """Where a field lies, or 0 if the table leaves it out."""
        slot = 4 + 2 * field
        if slot + 2 > self.vtable_bytes:
            return 0
        offset = _number_at(self.data, self.vtable + slot, 2)
        if offset and offset + nbytes > self.table_bytes:
            raise FlatBufferError("a field lies outside of its table")
        return self.at + offset if offset else 0


def root(data: memoryview) -> FlatTable:
    """The table that a FlatBuffer begins with."""
    return table_at(data, _follow(data, 0))


def table_at(data: memoryview, at: int) -> FlatTable:
    """The table at an offset, its extent checked."""
    vtable = at - _number_at(data, at, 4, is_signed=True)
    vtable_bytes, table_bytes = _number_at(data, vtable, 2), _number_at(data, vtable + 2, 2)
    if vtable + vtable_bytes > len(data) or at + table_bytes > len(data):
        raise FlatBufferError("a table reaches past its end")
    return FlatTable(data, at, vtable, vtable_bytes, table_bytes)


def _follow(data: memoryview, at: int) -> int:
    return at + _number_at(data, at, OFFSET_BYTES)


def _number_at(data: memoryview, at: int, nbytes: int, *, is_signed: bool = False) -> int:
    if at < 0 or at + nbytes > len(data):
        raise FlatBufferError("an offset points past its end")
    return int.from_bytes(data[at : at + nbytes], "little", signed=is_signed)
