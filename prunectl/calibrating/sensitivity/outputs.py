"""How far the outputs of a layer are off when some of its weights are gone."""

from __future__ import annotations

import numpy as np

from prunectl.calibrating import scores
from prunectl.calibrating.calibration import Calibration
from prunectl.calibrating.columns import by_group, matrix
from prunectl.calibrating.moments import Wide
from prunectl.calibrating.sensitivity.found import SPARSITIES
from prunectl.calibrating.sensitivity.weights import Levels
from prunectl.formats.base import Array, Tensor
from prunectl.training.sights import Sight

Errors = tuple[float | None, ...]


def output_errors(calibration: Calibration, tensor: Tensor, weights: Array, gone: Levels) -> Errors | None:
    """Return for each sparsity the norm of what outputs lose over that of the outputs, before any bias.

    None if not all outputs of the tensor were seen; None for a sparsity if there is nothing to compare with.
    """

    def lost(sight: Sight, kernel: tuple[int, ...]) -> tuple[Wide, int]:
        return _lost(sight, kernel, weights, gone)

    seen = calibration.sums([tensor], lost).get(tensor.name)
    if seen is None or not scores.is_covered(tensor.shape, seen):
        return None
    *squares, whole = np.sum(list(seen.totals.values()), axis=0).tolist()
    if not whole:
        return tuple(None if square else 0.0 for square in squares)
    return tuple(float(np.sqrt(square / whole)) for square in squares)


def _lost(sight: Sight, kernel: tuple[int, ...], weights: Array, gone: Levels) -> tuple[Wide, int]:
    """Return the sum of the squares of what outputs lose at each sparsity, and of the outputs.

    From the outputs themselves: the products of all inputs would take the square of their number in memory.
    """
    rows, levels = matrix(weights, sight.use).astype(np.float32), matrix(gone, sight.use)
    found, positions = np.zeros(len(SPARSITIES) + 1), 0
    for inputs in by_group(sight.inputs, sight.use, kernel, len(rows) * rows.shape[1]):
        for level in range(len(found)):
            # At the last level all is gone: what is lost then is the output.
            part = np.where(levels <= level, rows, np.float32(0))
            found[level] += np.square(np.matmul(inputs, part.transpose(0, 2, 1)), dtype=np.float64).sum()
        positions += inputs.shape[1]
    return found, positions
