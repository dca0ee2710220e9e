"""Masks from scores: exact selection of the k lowest of n by radix select, N:M groups, blocks.

Radix select takes constant memory, and gives the same on any machine. Scores are non-negative floats, whose order is
that of their bits read as integers. Each pass over the scores counts sixteen more of these bits into bins, and looks
closer at the one bin in which the k-th lowest score must lie.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from prunectl.errors import InputError
from prunectl.formats.workers import workers

Array = NDArray[Any]
Mask = NDArray[np.bool_]
Source = Callable[[], Iterator[Array]]
"""Yields the scores of one tensor in order, block by block, each time it is called."""

Result = TypeVar("Result")
THREADS = 2
_MANY = 1 << 20
DIGIT_BITS = 16
BINS = 1 << DIGIT_BITS
_SAMPLE_STEP = 64
_SAMPLE_LEAST = 10_000
_SAMPLE_ERRORS = 6
"""How many standard errors of the sample the cut may lie off."""
_CLOSE_BINS = 32
"""How many bins of the first pass are looked into at once: a few megabytes of counts."""


@dataclass(frozen=True, slots=True)
class Threshold:
    """The k-th lowest score: all below its sort key are pruned, and so many of those that equal it."""

    key: int
    ties: tuple[int, ...]
    """How many ties are pruned in each source, counted from its beginning."""
    is_wide: bool = False
    """Whether the key is that of a score in 64 bits, whatever the scores of these sources have."""

    def masker(self, source: int) -> ThresholdMasker:
        """The masker of one source's scores, block by block in order."""
        return ThresholdMasker(self.key, self.ties[source])


@dataclass(slots=True)
class ThresholdMasker:
    """Masks scores below a threshold block by block, counting the ties that are still to be pruned."""

    key: int
    ties_left: int

    def mask(self, scores: Array) -> Mask:
        """Mask of the scores of the next block that are pruned."""
        keys = sort_keys(scores)
        dropped: Mask = keys < self.key
        if self.ties_left:
            tied = np.flatnonzero(keys == self.key)[: self.ties_left]
            dropped.reshape(-1)[tied] = True
            self.ties_left -= len(tied)
        return dropped


def sort_keys(scores: Array) -> Array:
    """Sort keys: the bits of non-negative floats as integers of the same order; minus zero is zero."""
    contiguous = np.ascontiguousarray(scores)
    if contiguous.dtype.itemsize == 8:
        return np.asarray(contiguous.view(np.uint64) & np.uint64(0x7FFFFFFFFFFFFFFF))
    return np.asarray(contiguous.view(np.uint32) & np.uint32(0x7FFFFFFF))


def threshold(sources: Sequence[Source], drop: int, size: int) -> Threshold:
    """The threshold that prunes exactly so many of all scores, ties in the order of the sources."""
    if drop == 0:
        return Threshold(0, (0,) * len(sources))
    select = sorted_select if size < _SAMPLE_LEAST * _SAMPLE_STEP else sampled_select
    key, below, equal = select(sources, drop) or radix_select(sources, drop)
    return Threshold(key, split_ties(sources, key, drop - below, equal))


def sorted_select(sources: Sequence[Source], drop: int) -> tuple[int, int, int] | None:
    """As `radix_select`, by sorting, which is faster where the scores are too few to be sampled."""
    keys = np.concatenate(
        [sort_keys(block).reshape(-1) for block in chain.from_iterable(source() for source in sources)]
    )
    if keys.size < drop:
        return None
    key = np.partition(keys, drop - 1)[drop - 1]
    return int(key), int(np.count_nonzero(keys < key)), int(np.count_nonzero(keys == key))


def sampled_select(sources: Sequence[Source], drop: int) -> tuple[int, int, int] | None:
    """As `radix_select`, within a bracket estimated from a sample; None where the bracket misses.

    Comparing a block with two numbers is ten times as fast as counting it into bins.
    """
    guess = _bracket_from_sample(sources, drop)
    if guess is None:
        return None
    first, last = guess
    low, high = np.uint32(first << DIGIT_BITS), np.uint32((last << DIGIT_BITS) + BINS - 1)
    below, counts = 0, np.zeros((last - first + 1) * BINS, np.int64)
    with closing(_map_parallel(partial(_count_between, low=low, high=high), sources)) as counted:
        for counted_part in counted:
            below, counts = below + counted_part[0], counts + counted_part[1].counts()
    rising = np.cumsum(counts)
    if not below < drop <= below + int(rising[-1]):
        return None
    index = int(np.searchsorted(rising, drop - below))
    return int(low) + index, below + int(rising[index] - counts[index]), int(counts[index])


def _count_between(source: Source, low: np.uint32, high: np.uint32) -> tuple[int, LazyHistogram]:
    """How many keys of a source are below two numbers, and how far those between them lie above the first."""
    below, between = 0, LazyHistogram(int(high) - int(low) + 1)
    for block in source():
        keys = sort_keys(block).reshape(-1)
        below += int(np.count_nonzero(keys < low))
        between.add(keys[np.flatnonzero((keys >= low) & (keys <= high))] - low)
    return below, between


def _sample(source: Source) -> tuple[int, LazyHistogram | None]:
    """How many scores a source has, and the upper bits of some; none if they are wider than 32 bits."""
    size, digits = 0, LazyHistogram(BINS)
    for block in source():
        if block.dtype.itemsize != np.dtype(np.float32).itemsize:
            return 0, None
        keys = sort_keys(np.ascontiguousarray(block.reshape(-1)[::_SAMPLE_STEP]))
        digits.add(keys >> np.uint32(DIGIT_BITS))
        size += block.size
    return size, digits


class LazyHistogram:
    """A histogram of small integers that batches them until it pays to count."""

    def __init__(self, length: int) -> None:
        self._counts = np.zeros(length, np.int64)
        self._waiting: list[Array] = []
        self._waiting_size = 0

    def add(self, numbers: Array) -> None:
        """Add numbers, counted now or later."""
        self._waiting.append(numbers)
        self._waiting_size += numbers.size
        if self._waiting_size > _MANY:
            self.counts()

    def counts(self) -> NDArray[np.int64]:
        """The counts of all numbers added."""
        if self._waiting_size:
            numbers = np.concatenate(self._waiting).astype(np.intp)
            self._counts += np.bincount(numbers, minlength=len(self._counts))
            self._waiting, self._waiting_size = [], 0
        return self._counts


def _map_parallel(work: Callable[[Source], Result], sources: Sequence[Source]) -> Generator[Result]:
    """Yield the results of a function on each source, two at a time."""
    with workers(THREADS) as pool:
        yield from pool.map(work, sources)


def _bracket_from_sample(sources: Sequence[Source], drop: int) -> tuple[int, int] | None:
    """First and last bin of the upper bits between which the threshold lies by a sample, or None."""
    counts = np.zeros(BINS, np.int64)
    total = 0
    with closing(_map_parallel(_sample, sources)) as sampled_each:
        for size, digits in sampled_each:
            if digits is None:
                return None
            counts += digits.counts()
            total += size
    sampled = int(counts.sum())
    if sampled < _SAMPLE_LEAST:
        return None
    share = drop / total
    error = _SAMPLE_ERRORS * math.sqrt(share * (1 - share) / sampled) * sampled + 1
    rising = np.cumsum(counts)
    first = int(np.searchsorted(rising, max(share * sampled - error, 0)))
    last = min(int(np.searchsorted(rising, share * sampled + error)), BINS - 1)
    return (first, last) if last - first < _CLOSE_BINS else None


def radix_select(sources: Sequence[Source], drop: int) -> tuple[int, int, int]:
    """The key of the k-th lowest score, how many are below it, and how many equal it, sixteen bits a pass."""
    prefix, below, equal, shift = 0, 0, 0, None
    while shift is None or shift > 0:
        counted = [count_digits(source, prefix, shift) for source in sources]
        shift = max(low for _, low in counted)
        prefix, below, equal = next_digit(np.sum([counts for counts, _ in counted], axis=0), prefix, below, drop)
    return prefix, below, equal


def count_digits(source: Source, prefix: int, shift: int | None) -> tuple[NDArray[np.int64], int]:
    """How many keys of a source have each next digit, of those that begin with a prefix; how many bits are behind it.

    The shift is how many bits are behind the prefix; None where there is no prefix yet.
    """
    counts, low = np.zeros(BINS, np.int64), 0
    for block in source():
        keys = sort_keys(block).reshape(-1)
        low = (keys.dtype.itemsize * 8 if shift is None else shift) - DIGIT_BITS
        if shift is not None:
            keys = keys[keys >> keys.dtype.type(shift) == prefix]
        digits = (keys >> keys.dtype.type(low)) & keys.dtype.type(BINS - 1)
        counts += np.bincount(digits.astype(np.intp), minlength=BINS)
    return counts, low


def next_digit(counts: NDArray[np.int64], prefix: int, below: int, drop: int) -> tuple[int, int, int]:
    """The prefix of the k-th lowest key with its next digit, how many keys are below all that have it, and how many do.

    Counts add up: those of parts of a model, counted anywhere, lead to the key of the whole.
    """
    rising = np.cumsum(counts)
    digit = int(np.searchsorted(rising, drop - below))
    if digit == BINS:
        raise ValueError(f"there are fewer than {drop} scores")
    return prefix << DIGIT_BITS | digit, below + int(rising[digit] - counts[digit]), int(counts[digit])


def split_ties(sources: Sequence[Source], key: int, ties: int, equal: int) -> tuple[int, ...]:
    """Ties to prune in each source, the first sources first."""
    if len(sources) == 1 or ties == equal:
        return (ties,) * len(sources)
    shares = []
    for source in sources:
        tied = sum(int(np.count_nonzero(sort_keys(block) == key)) for block in source()) if ties else 0
        shares.append(min(tied, ties))
        ties -= shares[-1]
    return tuple(shares)


_FEW = 16


class Pooling(StrEnum):
    """How the scores of a block's weights are pooled into one."""

    AVG = "avg"
    MAX = "max"


def lowest_per_group(scores: Array, axis: int, zeros: int, group: int) -> Mask:
    """N:M mask: the N lowest of every M consecutive scores along an axis, ties from the beginning.

    What does not divide is padded with scores that go first, as tfmot pads it: a short group at the end
    loses fewer.
    """
    moved = np.moveaxis(scores, axis, -1)
    missing = -moved.shape[-1] % group
    padded = np.pad(moved, [(0, 0)] * (moved.ndim - 1) + [(0, missing)], constant_values=-1)
    mask = _lowest(padded.reshape(-1, group), zeros).reshape(padded.shape)[..., : moved.shape[-1]]
    return np.ascontiguousarray(np.moveaxis(mask, -1, axis))


def _lowest(groups: Array, count: int) -> Mask:
    """Mark the lowest scores of each row, ties from the left."""
    pruned = np.zeros(groups.shape, np.bool_)
    if groups.shape[1] > _FEW:
        order = np.argsort(groups, axis=1, kind="stable")[:, :count]
        np.put_along_axis(pruned, order, values=True, axis=1)
        return pruned
    # How many go before each: for groups as small as these, comparing all pairs is faster than sorting.
    columns = np.ascontiguousarray(groups.T)
    for index, column in enumerate(columns):
        before = np.zeros(len(groups), np.uint8)
        for other_index, score in enumerate(columns):
            if other_index != index:
                before += (score <= column) if other_index < index else (score < column)
        pruned[:, index] = before < count
    return pruned


def lowest_blocks(scores: Array, out_axis: int, size: tuple[int, int], pool: Pooling, sparsity: float) -> Mask:
    """Block mask: the lowest share of the blocks of a kernel, seen as a matrix of inputs by outputs."""
    moved = np.moveaxis(scores, out_axis, -1)
    matrix = moved.reshape(-1, moved.shape[-1])
    pooled = _block_scores(matrix, size, pool)
    pruned = np.zeros(pooled.size, np.bool_)
    pruned[np.argsort(pooled, axis=None, kind="stable")[: round(sparsity * pooled.size)]] = True
    spread = np.repeat(np.repeat(pruned.reshape(pooled.shape), size[0], axis=0), size[1], axis=1)
    inside = spread[: matrix.shape[0], : matrix.shape[1]].reshape(moved.shape)
    return np.ascontiguousarray(np.moveaxis(inside, -1, out_axis))


def _block_scores(matrix: Array, size: tuple[int, int], pool: Pooling) -> Array:
    """Pooled score of each block; a block at the edge counts what it has."""
    starts = [np.arange(0, length, step) for length, step in zip(matrix.shape, size, strict=True)]
    wide = matrix.astype(np.float64)
    if pool is Pooling.MAX:
        return np.maximum.reduceat(np.maximum.reduceat(wide, starts[0], axis=0), starts[1], axis=1)
    sums = np.add.reduceat(np.add.reduceat(wide, starts[0], axis=0), starts[1], axis=1)
    lengths = [np.diff([*start, length]) for start, length in zip(starts, matrix.shape, strict=True)]
    return np.asarray(sums / np.outer(*lengths))


class NonFinitePolicy(StrEnum):
    """What to do with weights that are NaN or infinite."""

    ERROR = "error"
    ZERO = "zero"
    KEEP = "keep"


def rank_nonfinite(scores: Array, policy: NonFinitePolicy, name: str) -> tuple[Array, Mask | None]:
    """Scores that can be ranked, and the mask of weights that are zeroed whatever their rank."""
    finite = np.isfinite(scores)
    if finite.all():
        return scores, None
    if policy is NonFinitePolicy.ERROR:
        raise InputError(
            f"{name} has weights that are NaN or infinite", hint="--nan zero sets them to zero, --nan keep keeps them"
        )
    if policy is NonFinitePolicy.ZERO:
        return np.where(finite, scores, scores.dtype.type(0)), ~finite
    return np.where(finite, scores, scores.dtype.type(np.inf)), None


def check_pruned_nonfinite(scores: Array, pruned: Mask, policy: NonFinitePolicy, name: str) -> None:
    """Reject a mask that prunes weights which --nan keep must keep."""
    if policy is NonFinitePolicy.KEEP and not np.isfinite(scores[pruned]).all():
        raise InputError(
            f"{name} has more NaN or infinite weights than can be kept", hint="--nan zero sets them to zero"
        )
