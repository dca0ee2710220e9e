"""Do the zeros of a tensor empty whole channels, or follow a pattern?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prunectl.formats.base import ModelFile, Tensor
from prunectl.measuring.blocks import slabs
from prunectl.measuring.patterns import Channel, Pattern
from prunectl.measuring.zeros import nonzero


@dataclass(frozen=True, slots=True)
class Regularity:
    """What a second look at a tensor's zeros finds."""

    dead_channels: int
    conforming: float | None
    """Share of the pattern's groups that follow it."""


def regularity(model: ModelFile, tensor: Tensor, out_axis: int, pattern: Pattern | None) -> Regularity:
    """Look at the zeros of a kernel slab by slab."""
    kept_of = np.zeros(tensor.shape[out_axis], np.int64)
    follow = groups = 0
    for begin, slab in slabs(model, tensor, pattern.aligned if pattern else 1):
        kept = nonzero(slab)
        others = tuple(axis for axis in range(kept.ndim) if axis != out_axis)
        if out_axis == 0:
            kept_of[begin : begin + len(kept)] = kept.sum(axis=others)
        else:
            kept_of += kept.sum(axis=others)
        tally = pattern.tally(tensor, kept) if pattern else None
        if tally is not None:
            follow, groups = follow + tally[0], groups + tally[1]
    if isinstance(pattern, Channel):
        per_channel = tensor.size // len(kept_of)
        follow, groups = int(np.count_nonzero((kept_of == 0) | (kept_of == per_channel))), len(kept_of)
    return Regularity(int(np.count_nonzero(kept_of == 0)), follow / groups if groups else None)
