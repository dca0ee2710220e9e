"""How sparse must a model be to get below a size? Sought on the real size."""

from __future__ import annotations

from collections.abc import Callable

from prunectl.errors import WorkError

SPARSEST = 0.99
"""Beyond it whole layers go out, whatever the size."""
CLOSE = 0.99
"""A result between this share of the target and the target itself is good enough."""
_TRIES = 40


def reach(size_at: Callable[[float], int], target: int, what: str) -> float:
    """Return a sparsity whose size is at most the target, and hardly below it."""
    low, high = 0.0, SPARSEST
    dense = size_at(low)
    if dense <= target:
        return low
    floor = size_at(high)
    if floor > target:
        raise WorkError(
            f"a {what} size of {target} bytes is out of reach: {SPARSEST:.0%} sparsity gives {floor}",
            hint="what is left are biases, norms and excluded layers; try --policy all or --only '*'",
        )
    above, below = dense, floor
    for turn in range(_TRIES):
        if below >= CLOSE * target or high - low < 1e-9:
            break
        # Straight lines between the ends find smooth curves fast; every third guess halves, so that a bent one ends.
        share = 0.5 if turn % 3 == 2 else (above - CLOSE * target) / (above - below)
        middle = low + (high - low) * min(max(share, 0.02), 0.98)
        size = size_at(middle)
        if size <= target:
            high, below = middle, size
        else:
            low, above = middle, size
    return high
