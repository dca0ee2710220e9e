"""Which weight does each mask of a layer belong to? By shape, and in the order in which tfmot makes masks."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass

_PRUNED = frozenset({"kernel", "recurrent_kernel", "pointwise_kernel", "embeddings"})
"""What tfmot prunes in the layers that it knows; in others it may be anything."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight or a mask: where it lies in the file."""

    path: str
    leaf: str
    shape: tuple[int, ...]


class NoWeightError(Exception):
    """A mask fits no weight of its layer."""

    def __init__(self, mask: Weight) -> None:
        super().__init__(f"its mask {mask.path} has the shape {list(mask.shape)}, which no weight of its layer has")


def matched(masks: Sequence[Weight], weights: Sequence[Weight]) -> dict[str, str]:
    """Return the mask of each weight that has one, by their paths."""
    left: defaultdict[tuple[int, ...], deque[Weight]] = defaultdict(deque)
    for weight in sorted(weights, key=lambda weight: weight.leaf not in _PRUNED):
        left[weight.shape].append(weight)
    found: dict[str, str] = {}
    for mask in masks:
        if not left[mask.shape]:
            raise NoWeightError(mask)
        found[left[mask.shape].popleft().path] = mask.path
    return found
