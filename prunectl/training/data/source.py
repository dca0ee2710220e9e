"""Where examples come from, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

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
class Order:
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

    def batches(self, order: Order) -> Iterator[Batch]:
        """Yield the batches of one epoch; the last may be smaller."""

    def labels(self) -> Iterator[Arrays]:
        """Yield all targets in order, where this needs no inputs; else nothing."""

    def changed(self, change: Callable[[Batch], Batch], *notes: str) -> Source:
        """Return the source whose batches are changed, example by example."""

    def numbered(self, is_kept: Callable[[Indices], Mask]) -> Source:
        """Return the examples whose numbers are kept."""

    def where(self, holds: Callable[[Arrays], Mask]) -> Source:
        """Return the examples with targets for which something holds."""

    def first(self, count: int) -> Source:
        """Return at most that many examples from the beginning."""


def each(arrays: Arrays) -> tuple[Array, ...]:
    """Return the arrays one by one, also if there is only one."""
    return arrays if isinstance(arrays, tuple) else (arrays,)


def mapped(change: Callable[[Array], Any], arrays: Arrays) -> Arrays:
    """Return the arrays, each changed, alone if there was only one."""
    return tuple(change(one) for one in arrays) if isinstance(arrays, tuple) else change(arrays)


def peek(source: Source, examples: int = 32) -> Batch | None:
    """Return the first examples; None if there are none."""
    return next(source.batches(Order(examples)), None)
