"""Weight clustering (Deep Compression, Han et al. 2016): few distinct values in each tensor, found by k-means.

A tensor of K values compresses well, and zeros stay zero. The initial centroids are those of tfmot, which stops there
and lets training move them. Here Lloyd's iterations (Lloyd 1982) move each centroid to the mean of its weights until no
weight changes its cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunectl.analysis.tensor_io import nonzero_mask
from prunectl.errors import UsageError
from prunectl.formats.base import Array
from prunectl.pruning.masks import Mask
from prunectl.pruning.strategies import uniform_numbers

MAX_CLUSTERS = 1 << 16
"""As many values as a 16-bit code has."""
MAX_ITERATIONS = 300
_GRID, _GAP, _LEAST_SHARE = 30, 0.01, 0.01
"""Of tfmot's density start: the points of the cumulative distribution, how far they reach beyond the weights, and the
share of weights below the first centroid."""
Wide = NDArray[np.float64]
Blocks = Iterator[tuple[Array, Mask]]


class Start(StrEnum):
    """How the centroids are initialised."""

    LINEAR = "linear"
    """Evenly spaced from the smallest weight to the largest, which Han et al. found best."""
    RANDOM = "random"
    """Drawn uniformly between the smallest weight and the largest."""
    DENSITY = "density"
    """At evenly spaced quantiles of the weights."""
    KMEANS_PLUS_PLUS = "kmeans++"
    """At weights drawn with a probability by squared distance from earlier ones (Arthur & Vassilvitskii 2007)."""


@dataclass(frozen=True, slots=True)
class Clustering:
    """The number of distinct values of each tensor, and how the centroids are initialised."""

    count: int
    """In a tensor with zeros, zero is one of them."""
    start: Start = Start.LINEAR


def parse(text: str) -> Clustering:
    """Parse `16` or `16:kmeans++`."""
    number, sign, start = text.partition(":")
    starts = [str(member) for member in Start]
    if (sign and start not in starts) or not (number.isascii() and number.isdecimal()):
        raise UsageError(
            f"{text!r} is not a number of clusters", hint=f"write 16, or 16:START with {', '.join(starts)}"
        )
    if not 2 <= int(number) <= MAX_CLUSTERS:
        raise UsageError(
            f"the number of clusters must be from 2 to {MAX_CLUSTERS}, not {int(number)}", hint="write --cluster 16"
        )
    return Clustering(int(number), Start(start) if sign else Start.LINEAR)


def clustered(make: Callable[[], Blocks], clustering: Clustering, name: str, seed: int) -> Blocks:
    """Yield the blocks of a tensor with every kept weight replaced by the nearest centroid."""
    # Computed once, since scoring may take long, and copied, since each block is valid only until the next.
    pruned = [(block.copy(order="C"), dropped.copy()) for block, dropped in make()]
    kept = [block[_is_clustered(block)] for block, _ in pruned]
    values = np.sort(np.concatenate(kept).astype(np.float64)) if kept else np.empty(0)
    if values.size:
        dtype, size = kept[0].dtype, sum(block.size for block, _ in pruned)
        del kept
        uniform = uniform_numbers(clustering.count, f"{seed}/{name}/clusters")
        book = codebook(values, clustering, uniform, has_zeros=values.size < size, dtype=dtype)
        codes = book.astype(dtype)
        for block, _ in pruned:
            is_clustered = _is_clustered(block)
            block[is_clustered] = codes[nearest(block[is_clustered].astype(np.float64), book)]
    yield from pruned


def codebook(
    values: Wide,
    clustering: Clustering,
    uniform: Wide,
    *,
    has_zeros: bool,
    dtype: np.dtype[Any],
    iterations: int = MAX_ITERATIONS,
) -> Wide:
    """The centroids of sorted weights in ascending order, none of which is zero in the stored data type.

    `uniform` has a random number from 0 to 1 for each centroid, for random initialisation.
    """
    count = clustering.count - has_zeros
    distinct = np.unique(values)
    if distinct.size <= count:
        return distinct
    centroids = np.sort(initial_centroids(values, clustering, uniform, has_zeros=has_zeros))
    sums = np.concatenate(([0.0], np.cumsum(values)))
    bounds = _bounds(values, centroids)
    for _ in range(iterations):
        counts = np.diff(bounds)
        means = np.divide(np.diff(sums[bounds]), counts, out=centroids.copy(), where=counts > 0)
        # The centroid of an empty cluster does not move, so that the order may change.
        centroids = np.sort(means)
        new_bounds = _bounds(values, centroids)
        if np.array_equal(new_bounds, bounds):
            break
        bounds = new_bounds
    return _move_off_zero(values, centroids, bounds, dtype)


def initial_centroids(values: Wide, clustering: Clustering, uniform: Wide, *, has_zeros: bool) -> Wide:
    """The initial centroids, as in tfmot: if there are zeros, negative and positive weights each get their share."""
    start = _STARTS[clustering.start]
    if not has_zeros:
        return start(values, uniform, _GAP)
    negative, positive = values[values < 0], values[values > 0]
    below = round((clustering.count - 1) * negative.size / values.size)
    parts = ((negative, uniform[:below]), (positive, uniform[below:-1]))
    return np.concatenate([start(part, own, _gap(part)) for part, own in parts if part.size and own.size])


def nearest(values: Wide, centroids: Wide) -> NDArray[np.intp]:
    """Index of the nearest centroid of each weight; the lower one of two equally near."""
    return np.searchsorted((centroids[:-1] + centroids[1:]) / 2, values, side="left")


def _is_clustered(block: Array) -> Mask:
    """Mask of the weights that are clustered: not zeros, NaN or infinity."""
    mask: Mask = nonzero_mask(block) & np.isfinite(block)
    return mask


def _bounds(values: Wide, centroids: Wide) -> NDArray[np.intp]:
    """The indices in the sorted weights at which each cluster begins and the last one ends."""
    inner = np.searchsorted(values, (centroids[:-1] + centroids[1:]) / 2, side="right")
    return np.concatenate(([0], inner, [values.size]))


def _move_off_zero(values: Wide, centroids: Wide, bounds: NDArray[np.intp], dtype: np.dtype[Any]) -> Wide:
    """Move a centroid that is zero to its smallest weight, so that kept weights stay nonzero."""
    for cluster in np.flatnonzero(centroids.astype(dtype).astype(np.float64) == 0):
        own = values[bounds[cluster] : bounds[cluster + 1]]
        if own.size:
            centroids[cluster] = own[np.argmin(np.abs(own))]
    return centroids


def _by_density(values: Wide, uniform: Wide, gap: float) -> Wide:
    grid = np.linspace(values[0] - gap, values[-1] + gap, _GRID)
    shares = np.searchsorted(values, grid, side="right") / values.size
    indices = np.searchsorted(shares, np.linspace(_LEAST_SHARE, 1, uniform.size), side="right")
    return np.asarray(grid[np.minimum(indices, _GRID - 1)])


def _gap(values: Wide) -> float:
    """How far the points of the distribution reach beyond the weights of one sign, without reaching zero."""
    return float(min(_GAP, *np.abs(values[[0, -1]]) / 2)) if values.size else _GAP


def _plus_plus(values: Wide, uniform: Wide, _: float) -> Wide:
    centroids = np.empty(uniform.size)
    centroids[0] = values[int(uniform[0] * values.size)]
    distances = np.square(values - centroids[0])
    for index in range(1, uniform.size):
        shares = np.cumsum(distances)
        drawn = np.searchsorted(shares, uniform[index] * shares[-1], side="right")
        centroids[index] = values[min(drawn, values.size - 1)]
        np.minimum(distances, np.square(values - centroids[index]), out=distances)
    return centroids


_STARTS: Mapping[Start, Callable[[Wide, Wide, float], Wide]] = {
    Start.LINEAR: lambda values, uniform, _: np.linspace(values[0], values[-1], uniform.size),
    Start.RANDOM: lambda values, uniform, _: np.asarray(values[0] + (values[-1] - values[0]) * uniform),
    Start.DENSITY: _by_density,
    Start.KMEANS_PLUS_PLUS: _plus_plus,
}
