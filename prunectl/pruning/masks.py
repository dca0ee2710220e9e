"""Masks from scores: exact selection of the k lowest of n by radix select, N:M groups, blocks.

Radix select takes constant memory and gives the same result on any machine. Scores are non-negative floats, which have
the same order as their bits read as integers. Each pass over the scores builds a histogram of sixteen more bits, within
the one bin of the previous pass that contains the k-th lowest score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from prunectl.errors import InputError
from prunectl.formats.extents import read_ahead
from prunectl.formats.workers import workers

Array = NDArray[Any]
Mask = NDArray[np.bool_]
Source = Callable[[], Iterator[Array]]
"""Yields the scores of one tensor in order, or their sort keys, block by block, each time it is called."""

Result = TypeVar("Result")
THREADS = 2
_JOBS = 256
"""Most jobs; more sources than this share jobs, since a job for each small tensor costs more than its work."""
_BATCHED = 1 << 20
"""How many numbers a histogram collects before it counts them."""
_REMEMBERED = 4 << 20
"""Most scores near the threshold that are kept in memory, to count ties without another pass."""
DIGIT_BITS = 16
BINS = 1 << DIGIT_BITS
SAMPLE_STEP = 64
_SAMPLE_LEAST = 10_000
_SAMPLE_ERRORS = 6
"""Half the width of the bracket around the sampled threshold, in standard errors."""
_CLOSE_BINS = 32
"""The widest bracket, in bins of the first pass, that is counted at once: a few megabytes of counts."""


@dataclass(frozen=True, slots=True)
class Threshold:
    """The k-th lowest score: all scores below its sort key are pruned, and some of those that equal it (ties)."""

    key: int
    ties: tuple[int, ...]
    """How many ties are pruned in each source, counted from its beginning."""
    is_wide: bool = False
    """Whether the key is that of a 64-bit score, whatever the width of the scores of these sources."""

    def masker(self, source: int) -> ThresholdMasker:
        """The masker of one source's scores, block by block in order."""
        return ThresholdMasker(self.key, self.ties[source])


@dataclass(slots=True)
class ThresholdMasker:
    """Masks scores below a threshold block by block, and keeps count of the ties that are still to be pruned."""

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
    """Sort keys: the bits of non-negative floats as integers of the same order; -0.0 counts as 0.0."""
    return scores if scores.dtype.kind == "u" else magnitude_keys(np.ascontiguousarray(scores))


def magnitude_keys(weights: Array) -> Array:
    """Sort keys of the magnitudes of contiguous 32- or 64-bit floats: their bits without the sign bit."""
    if weights.dtype.itemsize == 8:
        return np.asarray(weights.view(np.uint64) & np.uint64(0x7FFFFFFFFFFFFFFF))
    return np.asarray(weights.view(np.uint32) & np.uint32(0x7FFFFFFF))


class KthLowest(NamedTuple):
    """The key of the k-th lowest score, how many are below it, and how many equal it."""

    key: int
    below: int
    equal: int
    tied: tuple[int, ...] | None = None
    """How many scores of each source equal it; None if they were not counted."""


def threshold(sources: Sequence[Source], drop: int, size: int, samples: Sequence[Source] = ()) -> Threshold:
    """The threshold that prunes exactly `drop` of all scores, ties in the order of the sources.

    Samples of the sources (one in `SAMPLE_STEP` scores) save a pass over all scores of big sources.
    """
    if drop == 0:
        return Threshold(0, (0,) * len(sources))
    kth = None
    if size < _SAMPLE_LEAST * SAMPLE_STEP:
        kth = sorted_select(sources, drop)
    elif guess := _bracket_from_sample(samples or [partial(_strided, source) for source in sources], drop / size):
        kth = select_between(sources, drop, *guess)
    key, below, equal, tied = kth or radix_select(sources, drop)
    return Threshold(key, split_ties(sources, key, drop - below, equal, tied))


def sorted_select(sources: Sequence[Source], drop: int) -> KthLowest | None:
    """Like `radix_select`, but by partial sorting, which is faster where the scores are too few to be sampled."""
    keys = np.concatenate(
        [sort_keys(block).reshape(-1) for block in chain.from_iterable(source() for source in sources)]
    )
    if keys.size < drop:
        return None
    key = np.partition(keys, drop - 1)[drop - 1]
    return KthLowest(int(key), int(np.count_nonzero(keys < key)), int(np.count_nonzero(keys == key)))


def select_between(sources: Sequence[Source], drop: int, first: int, last: int) -> KthLowest | None:
    """Like `radix_select`, but within a bracket of upper digits; None if the k-th lowest score is outside it.

    Comparing a block with two numbers is ten times as fast as counting it into bins.
    """
    low, width = np.uint32(first << DIGIT_BITS), (last - first + 1) * BINS
    below, between, num_held = 0, LazyHistogram(width), 0
    histograms: list[LazyHistogram] = []
    counting = _map_parallel(partial(_count_between, low=low, width=width), sources)
    with closing(counting) as counted:
        for below_part, between_part in counted:
            below += below_part
            between.add_all(between_part)
            num_held += between_part.held
            if num_held <= _REMEMBERED:
                histograms.append(between_part)
            else:
                histograms.clear()
    cumulative = np.cumsum(between.counts())
    if not below < drop <= below + int(cumulative[-1]):
        return None
    index = int(np.searchsorted(cumulative, drop - below))
    equal = between.count(index)
    tied = tuple(part.count(index) for part in histograms) if num_held <= _REMEMBERED else None
    return KthLowest(int(low) + index, below + int(cumulative[index]) - equal, equal, tied)


def _count_between(source: Source, low: np.uint32, width: int) -> tuple[int, LazyHistogram]:
    """The number of a source's keys below `low`, and the histogram of the distances of keys up to `width` above it."""
    below, between = 0, LazyHistogram(width)
    for block in source():
        keys = sort_keys(block).reshape(-1)
        below += int(np.count_nonzero(keys < low))
        # Unsigned subtraction: keys below `low` wrap around to large numbers.
        above = keys - low
        between.add(above[np.flatnonzero(above < np.uint32(width))])
    return below, between


def _strided(source: Source) -> Iterator[Array]:
    for block in source():
        yield np.ascontiguousarray(block.reshape(-1)[::SAMPLE_STEP])


def _sample(source: Source) -> LazyHistogram | None:
    """The histogram of the upper bits of a sample; None if its scores are not 32 bits wide."""
    digits = LazyHistogram(BINS)
    for block in source():
        if block.dtype.itemsize != np.dtype(np.float32).itemsize:
            return None
        digits.add(sort_keys(block).reshape(-1) >> np.uint32(DIGIT_BITS))
    return digits


class LazyHistogram:
    """A histogram of small integers, which collects numbers until there are enough to be worth counting."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._counts: NDArray[np.int64] | None = None
        self._waiting: list[Array] = []
        self._waiting_size = 0

    @property
    def held(self) -> int:
        """The memory that it takes, in units of one collected number."""
        return self._waiting_size + (0 if self._counts is None else 2 * self._length)

    def add(self, numbers: Array) -> None:
        """Add numbers, counted now or later."""
        if not numbers.size:
            return
        self._waiting.append(numbers)
        self._waiting_size += numbers.size
        if self._waiting_size > _BATCHED:
            self.counts()

    def add_all(self, other: LazyHistogram) -> None:
        """Add all numbers of another histogram of this length."""
        for numbers in other._waiting:
            self.add(numbers)
        if other._counts is not None:
            self._counts = self.counts() + other._counts

    def counts(self) -> NDArray[np.int64]:
        """The counts of all numbers added."""
        if self._counts is None:
            self._counts = np.zeros(self._length, np.int64)
        if self._waiting:
            numbers = np.concatenate(self._waiting).astype(np.intp)
            self._counts += np.bincount(numbers, minlength=self._length)
            self._waiting, self._waiting_size = [], 0
        return self._counts

    def count(self, number: int) -> int:
        """How often one number was added."""
        waiting = sum(int(np.count_nonzero(numbers == number)) for numbers in self._waiting)
        return waiting + (0 if self._counts is None else int(self._counts[number]))


def _map_parallel(work: Callable[[Source], Result], sources: Sequence[Source]) -> Generator[Result]:
    """Yield the results of a function on each source, two at a time."""
    share = len(sources) // _JOBS + 1

    def job(begin: int) -> list[Result]:
        with read_ahead():
            return [work(source) for source in sources[begin : begin + share]]

    with workers(THREADS) as pool:
        for results in pool.map(job, range(0, len(sources), share)):
            yield from results


def _bracket_from_sample(samples: Sequence[Source], share: float) -> tuple[int, int] | None:
    """First and last bin of the upper bits that bracket the threshold of a share; None if samples cannot narrow it."""
    digits = LazyHistogram(BINS)
    with closing(_map_parallel(_sample, samples)) as sampled_each:
        for histogram in sampled_each:
            if histogram is None:
                return None
            digits.add_all(histogram)
    counts = digits.counts()
    sampled = int(counts.sum())
    if sampled < _SAMPLE_LEAST:
        return None
    error = _SAMPLE_ERRORS * math.sqrt(share * (1 - share) / sampled) * sampled + 1
    cumulative = np.cumsum(counts)
    first = int(np.searchsorted(cumulative, max(share * sampled - error, 0)))
    last = min(int(np.searchsorted(cumulative, share * sampled + error)), BINS - 1)
    return (first, last) if last - first < _CLOSE_BINS else None


def radix_select(sources: Sequence[Source], drop: int) -> KthLowest:
    """The key of the k-th lowest score, how many scores are below it and how many equal it; 16 bits in each pass."""
    prefix, below, equal, shift = 0, 0, 0, None
    while shift is None or shift > 0:
        totals, remaining = np.zeros(BINS, np.int64), 0
        for source in sources:
            counts, low = count_digits(source, prefix, shift)
            totals, remaining = totals + counts, max(remaining, low)
        shift = remaining
        prefix, below, equal = next_digit(totals, prefix, below, drop)
    return KthLowest(prefix, below, equal)


def count_digits(source: Source, prefix: int, shift: int | None) -> tuple[NDArray[np.int64], int]:
    """The histogram of the next digit of a source's keys that begin with a prefix, and the bits after that digit.

    `shift` is the number of bits after the prefix; None if there is no prefix yet.
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
    """The prefix of the k-th lowest key with its next digit, how many keys are below that prefix, and how many have it.

    `counts` may be the sum of counts for parts of a model, which then gives the key for the whole model.
    """
    cumulative = np.cumsum(counts)
    digit = int(np.searchsorted(cumulative, drop - below))
    if digit == BINS:
        raise ValueError(f"there are fewer than {drop} scores")
    return prefix << DIGIT_BITS | digit, below + int(cumulative[digit] - counts[digit]), int(counts[digit])


def split_ties(
    sources: Sequence[Source], key: int, ties: int, equal: int, tied: Sequence[int] | None = None
) -> tuple[int, ...]:
    """The ties to prune in each source, in the order of the sources; `tied` are the ties of each, counted if None."""
    if len(sources) == 1 or ties == equal:
        return (ties,) * len(sources)
    shares = []
    for number, source in enumerate(sources):
        own = (_count_equal(source, key) if tied is None else tied[number]) if ties else 0
        shares.append(min(own, ties))
        ties -= shares[-1]
    return tuple(shares)


def _count_equal(source: Source, key: int) -> int:
    return sum(int(np.count_nonzero(sort_keys(block) == key)) for block in source())


_FEW = 16


class Pooling(StrEnum):
    """How the scores of a block's weights are pooled into one."""

    AVG = "avg"
    MAX = "max"


def lowest_per_group(scores: Array, axis: int, zeros: int, group: int) -> Mask:
    """N:M mask: the N lowest of every M consecutive scores along an axis, ties from the beginning.

    A short group at the end is padded with scores that are pruned first, as in tfmot, so that it loses fewer weights.
    """
    moved = np.moveaxis(scores, axis, -1)
    missing = -moved.shape[-1] % group
    padded = np.pad(moved, [(0, 0)] * (moved.ndim - 1) + [(0, missing)], constant_values=-1)
    mask = _lowest(padded.reshape(-1, group), zeros).reshape(padded.shape)[..., : moved.shape[-1]]
    return np.ascontiguousarray(np.moveaxis(mask, -1, axis))


def _lowest(groups: Array, count: int) -> Mask:
    """Mask of the lowest scores of each row, ties from the left."""
    pruned = np.zeros(groups.shape, np.bool_)
    if groups.shape[1] > _FEW:
        order = np.argsort(groups, axis=1, kind="stable")[:, :count]
        np.put_along_axis(pruned, order, values=True, axis=1)
        return pruned
    # Rank of each score: for groups as small as these, comparing all pairs is faster than sorting.
    columns = np.ascontiguousarray(groups.T)
    for index, column in enumerate(columns):
        rank = np.zeros(len(groups), np.uint8)
        for other_index, score in enumerate(columns):
            if other_index != index:
                rank += (score <= column) if other_index < index else (score < column)
        pruned[:, index] = rank < count
    return pruned


def lowest_blocks(scores: Array, out_axis: int, size: tuple[int, int], pool: Pooling, sparsity: float) -> Mask:
    """Block mask: the lowest share of the blocks of a kernel as a matrix of inputs by outputs."""
    moved = np.moveaxis(scores, out_axis, -1)
    matrix = moved.reshape(-1, moved.shape[-1])
    pooled = _block_scores(matrix, size, pool)
    pruned = np.zeros(pooled.size, np.bool_)
    pruned[np.argsort(pooled, axis=None, kind="stable")[: round(sparsity * pooled.size)]] = True
    spread = np.repeat(np.repeat(pruned.reshape(pooled.shape), size[0], axis=0), size[1], axis=1)
    cropped = spread[: matrix.shape[0], : matrix.shape[1]].reshape(moved.shape)
    return np.ascontiguousarray(np.moveaxis(cropped, -1, out_axis))


def _block_scores(matrix: Array, size: tuple[int, int], pool: Pooling) -> Array:
    """Pooled score of each block; a block at the edge is pooled over the weights that it has."""
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


def is_finite(scores: Array) -> bool:
    """Whether all scores, or all sort keys, are finite; the maximum is NaN if any is."""
    largest = scores.max()
    if scores.dtype.kind == "u":
        largest = largest.view(f"f{scores.dtype.itemsize}")
    return bool(np.isfinite(largest))


def rank_nonfinite(scores: Array, policy: NonFinitePolicy, name: str) -> tuple[Array, Mask | None]:
    """Scores without NaN, and the mask of weights that are zeroed whatever their rank; None for no weights."""
    if not scores.size or is_finite(scores):
        return scores, None
    scores = scores.view(f"f{scores.dtype.itemsize}")
    finite = np.isfinite(scores)
    if policy is NonFinitePolicy.ERROR:
        raise InputError(
            f"{name} has weights that are NaN or infinite", hint="--nan zero sets them to zero, --nan keep keeps them"
        )
    if policy is NonFinitePolicy.ZERO:
        return np.where(finite, scores, scores.dtype.type(0)), ~finite
    return np.where(finite, scores, scores.dtype.type(np.inf)), None


def check_pruned_nonfinite(scores: Array, pruned: Mask, policy: NonFinitePolicy, name: str) -> None:
    """Refuse a mask that prunes NaN or infinite weights, which --nan keep must keep."""
    if policy is NonFinitePolicy.KEEP and not np.isfinite(scores[pruned]).all():
        raise InputError(
            f"{name} has more NaN or infinite weights than can be kept", hint="--nan zero sets them to zero"
        )
