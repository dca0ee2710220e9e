"""Weights that stay, fitted anew: so that a layer's outputs come as near as they can to what they were."""

from __future__ import annotations

import numpy as np

from prunectl.calibrating.moments import Wide
from prunectl.calibrating.obs import damped_by
from prunectl.pruning.selection import Mask

_EXACT = 1e-20
"""The square of how far off a row may be, relative to what it is to give."""
_MOST_STEPS = 1000
"""Damped by a hundredth it takes 20 to 50."""


def refit(rows: Wide, among: Wide, across: Wide, kept: Mask, damp: float, *, start: Wide | None = None) -> Wide:
    """Return rows that are zero where nothing is kept, and elsewhere the least squares from the outputs that were.

    Among each other and across are the products of the inputs now, and of them with the inputs before. Damping pulls
    towards the old weights and not towards zero: without evidence a weight stays as it is.
    """
    damped = damped_by(among, damp)
    diagonal = np.diagonal(damped)
    wanted = np.where(kept, rows @ across.T + rows * (diagonal - np.diagonal(among)), 0.0)
    return _solved(damped, wanted, kept, np.where(kept, rows if start is None else start, 0.0))


def _solved(products: Wide, wanted: Wide, kept: Mask, found: Wide) -> Wide:
    """Return the solution of each row's own equations, by conjugate gradients from where it starts.

    Each row keeps other columns: to eliminate, row by row, takes minutes for a layer that this does in seconds.
    """
    scale = 1 / np.diagonal(products)
    limit = _EXACT * (wanted * wanted * scale).sum(axis=1)
    rest = wanted - np.where(kept, found @ products, 0.0)
    near = rest * scale
    step, size = near, (rest * near).sum(axis=1)
    for _ in range(_MOST_STEPS):
        if (size <= limit).all():
            break
        bent = np.where(kept, step @ products, 0.0)
        length = _over(size, (step * bent).sum(axis=1))
        found = found + length * step
        rest = rest - length * bent
        near = rest * scale
        before, size = size, (rest * near).sum(axis=1)
        step = near + _over(size, before) * step
    return found


def _over(one: Wide, other: Wide) -> Wide:
    """Return a ratio for each row, zero for rows that are done."""
    return np.divide(one, other, out=np.zeros_like(one), where=other > 0)[:, np.newaxis]


def centred(products: Wide, first: Wide, second: Wide, count: int) -> Wide:
    """Return the products of features less their means, for a layer whose bias sees to the means."""
    return products - first[:, :, np.newaxis] * second[:, np.newaxis] / count
