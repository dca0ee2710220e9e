"""The last activation of a model: is what comes out probabilities, their logarithms, or logits and plain numbers?"""

from __future__ import annotations

from enum import StrEnum

import numpy as np

from prunectl.formats.base import Array

_SUM_TOLERANCE = 1e-3
_TINY = 1e-7
"""Below the precision of 32-bit probabilities."""


class Ending(StrEnum):
    """What the last activation makes of its numbers."""

    SOFTMAX = "softmax"
    LOG_SOFTMAX = "log-softmax"
    SIGMOID = "sigmoid"
    RAW = "raw"
    UNKNOWN = ""
    """Nothing but the numbers tells."""


def by_numbers(array: Array, axis: int) -> Ending:
    """The ending that outputs look like, where the graph does not tell; the axis is that of the classes."""
    whole = np.asarray(array, np.float64)
    if not whole.size or not np.isfinite(whole).all():
        return Ending.RAW
    has_classes = whole.ndim > 1 and whole.shape[axis] > 1
    if has_classes and whole.max() <= 0.0 and _is_one(np.exp(whole).sum(axis=axis)):
        return Ending.LOG_SOFTMAX
    if whole.min() < 0.0 or whole.max() > 1.0:
        return Ending.RAW
    return Ending.SOFTMAX if has_classes and _is_one(whole.sum(axis=axis)) else Ending.SIGMOID


def _is_one(sums: Array) -> bool:
    return bool(np.all(np.abs(sums - 1.0) < _SUM_TOLERANCE))


def converted(array: Array, theirs: Ending, ours: Ending, axis: int) -> Array:
    """Outputs of one ending as another would have them; a logarithm of probabilities is as good as their logits."""
    if theirs is ours or Ending.UNKNOWN in {theirs, ours}:
        return array
    kind, wide = array.dtype, array.astype(np.float64)
    if theirs is Ending.SIGMOID:
        within = np.clip(wide, _TINY, 1.0 - _TINY)
        found = np.log(within) - np.log1p(-within)
    else:
        found = np.log(np.maximum(wide, _TINY)) if theirs is Ending.SOFTMAX else wide
    if ours is Ending.SIGMOID:
        found = 1.0 / (1.0 + np.exp(-found))
    elif ours in {Ending.SOFTMAX, Ending.LOG_SOFTMAX}:
        found = found - found.max(axis=axis, keepdims=True)
        found = found - np.log(np.exp(found).sum(axis=axis, keepdims=True))
        found = np.exp(found) if ours is Ending.SOFTMAX else found
    return found.astype(kind)
