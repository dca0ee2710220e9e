"""How sparse must a model be to get below a size? Sought on the real size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from prunectl.errors import UsageError, WorkError
from prunectl.pruning.plan import Choice

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


def at_compression(path: Path, choice: Choice, total: int, factor: float) -> float:
    """Return the sparsity at which all parameters of a model are so many times those that are kept."""
    sizes = {tensor.name: tensor.size for tensor in choice.tensors}
    settled = sum(round(share * sizes[name]) for name, share in choice.own.items())
    free = sum(sizes.values()) - sum(sizes[name] for name in choice.own)
    drop = max(total - total / factor - settled, 0)
    if drop > free:
        most = total / max(total - settled - free, 1)
        raise UsageError(
            f"a compression of {factor:g} is out of reach in {path}: without all {free + settled:,} weights "
            f"that may go it is {most:.3g}",
            hint="--policy all prunes biases, norms and embeddings as well",
        )
    return drop / free if free else 0.0
