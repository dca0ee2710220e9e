"""Lengths of axes that may be unknown, and how many elements they make together."""

from __future__ import annotations

import math
from collections.abc import Iterable

Length = int | None
Shape = tuple[Length, ...]
MAX_LENGTH = 1 << 48
"""An axis longer than this is a lie."""
MAX_COUNT = 1 << 62


def product(lengths: Iterable[Length]) -> int | None:
    """Return the product of lengths, if they are all known and it is one that a model can have."""
    known = tuple(lengths)
    if any(length is None for length in known):
        return None
    found = math.prod(length for length in known if length is not None)
    return found if found <= MAX_COUNT else None
