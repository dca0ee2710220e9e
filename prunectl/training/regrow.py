"""Masks that move: the small go, as many with large gradients come back (RigL, Evci et al. 2020)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Regrowth:
    """How much moves when: a share of the kept weights that falls along half a cosine."""

    begin: int
    end: int
    frequency: int
    share: float = 0.3

    def share_at(self, step: int) -> float:
        """Return the share of the kept weights that is exchanged."""
        done = min(max((step - self.begin) / max(self.end - self.begin, 1), 0.0), 1.0)
        return self.share * (1.0 + math.cos(math.pi * done)) / 2.0

    def prunes_at(self, step: int) -> bool:
        """Whether it is a turn."""
        return self.begin < step < self.end and (step - self.begin) % self.frequency == 0


def regrown(
    masks: Mapping[str, Mask], weights: Mapping[str, Array], gradients: Mapping[str, Array], share: float
) -> dict[str, Mask]:
    """Return masks with the same number of zeros in each tensor."""
    return {name: _exchanged(mask, weights[name], gradients.get(name), share) for name, mask in masks.items()}


def _exchanged(mask: Mask, weights: Array, gradient: Array | None, share: float) -> Mask:
    if gradient is None:
        return mask
    flat = mask.reshape(-1).copy()
    held, free = np.flatnonzero(flat), np.flatnonzero(~flat)
    count = min(round(share * held.size), free.size)
    if not count:
        return mask
    by_size = np.argsort(np.abs(weights.reshape(-1)[held]), kind="stable")
    # What was just dropped may come back at once, as in the paper: its gradient decides.
    gone = held[by_size[:count]]
    candidates = np.sort(np.concatenate([free, gone]))
    by_gradient = np.argsort(-np.abs(gradient.reshape(-1)[candidates]), kind="stable")
    flat[gone] = False
    flat[candidates[by_gradient[:count]]] = True
    return np.asarray(flat.reshape(mask.shape))
