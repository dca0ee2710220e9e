"""One source as two: examples to learn from, and others to judge by."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from prunectl.errors import InputError
from prunectl.training.data.source import Indices, Mask, Source


def split(source: Source, share: float, seed: int) -> tuple[Source, Source]:
    """Return the rest and the share of a source, which have no example in common.

    Of n examples the share gets round(share * n); where n is unknown, each goes where a hash of its number says.
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"share must be in (0, 1), not {share}")
    if source.count is None:
        return (
            source.numbered(lambda numbers: ~_falls_in(numbers, share, seed)),
            source.numbered(lambda numbers: _falls_in(numbers, share, seed)),
        )
    size = round(share * source.count)
    if not 0 < size < source.count:
        raise InputError(
            f"{source.name} has {source.count} examples: {share:.0%} of them leave nothing "
            f"{'to judge by' if size == 0 else 'to learn from'}"
        )
    is_shared = np.zeros(source.count, np.bool_)
    is_shared[np.random.default_rng((seed, source.count)).permutation(source.count)[:size]] = True
    return (
        source.numbered(lambda numbers: ~is_shared[numbers]),
        source.numbered(lambda numbers: is_shared[numbers]),
    )


def _falls_in(numbers: Indices, share: float, seed: int) -> Mask:
    return _mixed(numbers.astype(np.uint64) ^ _mixed(np.uint64(seed))) < np.uint64(share * 2.0**64)


def _mixed(numbers: NDArray[np.uint64] | np.uint64) -> NDArray[np.uint64]:
    """Return numbers of which every bit depends on every bit (the finaliser of SplitMix64)."""
    z = np.atleast_1d(np.asarray(numbers, np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
