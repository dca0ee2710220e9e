"""A counter-based random generator: splitmix64 over indices, keyed by FNV-1a of a text."""

from __future__ import annotations

from typing import overload

import numpy as np
from numpy.typing import NDArray


@overload
def splitmix64(numbers: int) -> int: ...
@overload
def splitmix64(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]: ...
def splitmix64(numbers: int | NDArray[np.uint64]) -> int | NDArray[np.uint64]:
    """The splitmix64 finaliser of each number (Steele, Lea and Flood 2014)."""
    if isinstance(numbers, int):
        return int(splitmix64(np.array([numbers], np.uint64))[0])
    with np.errstate(over="ignore"):
        bits = numbers * np.uint64(0x9E3779B97F4A7C15)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def fnv1a(text: str) -> int:
    """The FNV-1a hash of a text, in 62 bits to leave room for indices."""
    digest = 0xCBF29CE484222325
    for byte in text.encode():
        digest = (digest ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return digest >> 2
