"""Where examples come from, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from prunectl.errors import InputError
from prunectl.formats.base import Array

Arrays = Array | tuple[Array, ...]
"""One array, or several in the order of the model's inputs."""
Indices = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Batch:
    """Some examples; the first axis of each array counts them."""

    x: Arrays
    y: Arrays | None = None


@dataclass(frozen=True, slots=True)
class EpochOrder:
    """Which examples come when, for one process of perhaps several."""

    batch_size: int
    """Of each process."""
    seed: int = 0
    epoch: int = 0
    is_shuffled: bool = False
    skip: int = 0
    """Batches that an interrupted run has already done."""
    rank: int = 0
    ranks: int = 1
    workers: int = 0
    """Threads that read ahead."""

    @property
    def random(self) -> np.random.Generator:
        """The numbers that shuffle this epoch, the same in every process."""
        return np.random.default_rng((self.seed, self.epoch))


class Source(Protocol):
    """Examples that can be gone through again and again: the same order gives the same batches."""

    @property
    def name(self) -> str:
        """What the user calls it."""

    @property
    def count(self) -> int | None:
        """Number of examples, if it is known without reading all of them."""

    @property
    def has_targets(self) -> bool:
        """Whether each example says what the model should answer."""

    @property
    def is_random(self) -> bool:
        """Whether it is made up, and fit to see that things run, no more."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What was decided when it was opened, in sentences."""

    def batches(self, order: EpochOrder) -> Iterator[Batch]:
        """Yield the batches of one epoch; the last may be smaller."""

    def labels(self) -> Iterator[Arrays]:
        """Yield all targets in order, where this needs no inputs; else nothing."""

    def changed(self, change: Callable[[Batch], Batch], *notes: str) -> Source:
        """The source whose batches are changed, example by example."""

    def numbered(self, is_kept: Callable[[Indices], Mask]) -> Source:
        """The examples whose numbers are kept."""

    def where(self, holds: Callable[[Arrays], Mask]) -> Source:
        """The examples with targets for which something holds."""

    def first(self, count: int) -> Source:
        """At most that many examples from the beginning."""


def as_tuple(arrays: Arrays) -> tuple[Array, ...]:
    """The arrays one by one, also if there is only one."""
    return arrays if isinstance(arrays, tuple) else (arrays,)


def map_arrays(change: Callable[[Array], Any], arrays: Arrays) -> Arrays:
    """The arrays, each changed, alone if there was only one."""
    return tuple(change(array) for array in arrays) if isinstance(arrays, tuple) else change(arrays)


def peek(source: Source, examples: int = 32) -> Batch | None:
    """The first examples; None if there are none."""
    return next(source.batches(EpochOrder(examples)), None)


def train_val_split(source: Source, share: float, seed: int) -> tuple[Source, Source]:
    """The rest and the share of a source, which have no example in common.

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
    """Numbers of which every bit depends on every bit (the finaliser of SplitMix64)."""
    z = np.atleast_1d(np.asarray(numbers, np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
