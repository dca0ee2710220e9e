"""Weights that stay, fitted anew: so that a layer's outputs come as near as they can to what they were."""

from __future__ import annotations

import numpy as np

from prunectl.calibrating.moments import Wide
from prunectl.calibrating.obs import damped_by
from prunectl.pruning.selection import Mask


def refit(rows: Wide, among: Wide, across: Wide, kept: Mask, damp: float) -> Wide:
    """Return rows that are zero where nothing is kept, and elsewhere the least squares from the outputs that were.

    Among each other and across are the products of the inputs now, and of them with the inputs before. Damping pulls
    towards the old weights and not towards zero: without evidence a weight stays as it is.
    """
    damped = damped_by(among, damp)
    pull = np.diagonal(damped) - np.diagonal(among)
    wanted = rows @ across.T + rows * pull
    found = np.zeros_like(rows)
    for number, keep in enumerate(kept):
        if keep.any():
            at = np.flatnonzero(keep)
            found[number, at] = np.linalg.solve(damped[np.ix_(at, at)], wanted[number, at])
    return found


def centred(products: Wide, first: Wide, second: Wide, count: int) -> Wide:
    """Return the products of features less their means, for a layer whose bias sees to the means."""
    return products - first[:, :, np.newaxis] * second[:, np.newaxis] / count
