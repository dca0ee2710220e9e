"""How long work reports its progress, without knowing who watches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Bar(Protocol):
    """Something that counts bytes."""

    def advance(self, nbytes: int) -> None:
        """Count work that is done."""


Meter = Callable[[str, int], AbstractContextManager[Bar]]
"""Makes a bar of a label and a total."""


class _Unwatched:
    def advance(self, nbytes: int) -> None:
        """Count nothing."""


def unwatched(_label: str, _total_bytes: int) -> AbstractContextManager[Bar]:
    """Return a bar that nobody sees."""
    return nullcontext(_Unwatched())
