"""How big are the weights? Counted by powers of two."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from prunectl.formats.base import ModelFile, Tensor
from prunectl.measuring.blocks import blocks

_EXPONENTS = range(-1100, 1100)
_SHOWN = 16


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of weights by magnitude."""

    zero: int
    below: int
    """Not zero, but smaller than the first edge."""
    edges: tuple[float, ...]
    """Powers of two, rising; a bin reaches from one to the next."""
    counts: tuple[int, ...]
    not_finite: int


def histogram(model: ModelFile, tensors: Iterable[Tensor]) -> Histogram:
    """Return the magnitudes of some tensors, in the sixteen powers of two below the biggest."""
    totals = np.zeros(len(_EXPONENTS), np.int64)
    zero = not_finite = 0
    for tensor in tensors:
        for block in blocks(model, tensor):
            values = block.astype(np.float64).ravel()
            finite = values[np.isfinite(values)]
            not_finite += values.size - finite.size
            live = finite[finite != 0]
            zero += finite.size - live.size
            # frexp gives 0.5 <= m < 1 with v = m * 2**e, so that the bin of v is [2**(e-1), 2**e).
            exponents = np.frexp(live)[1] - 1
            totals += np.bincount(exponents - _EXPONENTS.start, minlength=totals.size)
    filled = np.flatnonzero(totals)
    if not filled.size:
        return Histogram(zero, 0, (), (), not_finite)
    first = max(int(filled[0]), int(filled[-1]) - _SHOWN + 1)
    counts = tuple(int(count) for count in totals[first : int(filled[-1]) + 1])
    edges = tuple(_power(_EXPONENTS[first + step]) for step in range(len(counts) + 1))
    return Histogram(zero, int(totals[:first].sum()), edges, counts, not_finite)


def _power(exponent: int) -> float:
    """Return a power of two; the first that is too big for a float is the biggest float."""
    return math.ldexp(1.0, exponent) if exponent < sys.float_info.max_exp else sys.float_info.max
