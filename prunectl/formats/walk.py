"""A walk through a protobuf file: no more fields than a model has, however they are nested."""

from __future__ import annotations

from collections.abc import Iterator

from prunectl.formats import budgets
from prunectl.formats.protobuf import BYTES, Field, WireError, fields


class Walk:
    """The fields of a file, counted as they are looked at."""

    def __init__(self, data: memoryview, most: int = budgets.MAX_PROTOBUF_FIELDS) -> None:
        self.data = data
        self._most = self._left = most

    def spend(self, count: int) -> None:
        """Count fields that were looked at in another way."""
        self._left -= count
        if self._left < 0:
            raise WireError(f"more than {self._most} fields")

    def fields(self, inside: Field | None = None) -> Iterator[Field]:
        """Yield the fields of a message, or of the whole file."""
        begin, end = (0, None) if inside is None else (inside.begin, inside.end)
        # To look into a message takes as long as a field does, also where it is empty.
        self.spend(1)
        for field in fields(self.data, begin, end):
            self.spend(1)
            yield field

    def messages(self, inside: Field | None, number: int) -> Iterator[Field]:
        """Yield the fields of one number that are messages, texts or bytes."""
        for field in self.fields(inside):
            if field.number == number and field.wire == BYTES:
                yield field
