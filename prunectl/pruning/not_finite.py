"""What becomes of weights that are NaN or infinite."""

from __future__ import annotations

from enum import StrEnum

import numpy as np

from prunectl.errors import InputError
from prunectl.pruning.selection import Array, Mask


class NotFinite(StrEnum):
    """What to do with them."""

    ERROR = "error"
    ZERO = "zero"
    KEEP = "keep"


def rank(scores: Array, what: NotFinite, name: str) -> tuple[Array, Mask | None]:
    """Return scores that can be ranked, and what is dropped whatever its rank."""
    finite = np.isfinite(scores)
    if finite.all():
        return scores, None
    if what is NotFinite.ERROR:
        raise InputError(
            f"{name} holds weights that are not finite numbers", hint="--nan zero drops them, --nan keep leaves them"
        )
    if what is NotFinite.ZERO:
        return np.where(finite, scores, scores.dtype.type(0)), ~finite
    return np.where(finite, scores, scores.dtype.type(np.inf)), None


def check_kept(scores: Array, dropped: Mask, what: NotFinite, name: str) -> None:
    """Refuse a cut that takes weights which are to be kept because they are not finite."""
    if what is NotFinite.KEEP and not np.isfinite(scores[dropped]).all():
        raise InputError(f"{name} holds more weights that are not finite than may stay", hint="--nan zero drops them")
