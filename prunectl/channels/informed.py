"""What data say of the weights that make channels, for the measures that rank by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing

import numpy as np

from prunectl.calibrating.opening import opened
from prunectl.calibrating.outputs import output_norms
from prunectl.channels.couple import Family
from prunectl.channels.scores import Measure, Needs
from prunectl.channels.trace import Part
from prunectl.formats.base import Array, ModelFile
from prunectl.pruning.request import Request


def looked_at(
    model: ModelFile,
    families: Sequence[Family],
    weights: Mapping[str, Array],
    measure: Measure | None,
    request: Request,
    *,
    is_trusted: bool,
) -> Mapping[str, Array]:
    """Return what a measure looks at, in the shape of each weight; the weights themselves, unless it needs data."""
    if measure is None or measure.needs is Needs.NOTHING:
        return weights
    makers = {
        place.tensor: place.axis
        for family in families
        for place in family.places
        if place.part is Part.OUT and not family.reason
    }
    held = {tensor.name: tensor for tensor in model.tensors if tensor.name in makers}
    if measure.needs is Needs.OUTPUTS:
        norms = output_norms(model, held.keys(), request, norm=measure.choice or "1", is_trusted=is_trusted)
        return {
            name: _spread(norm, weights[name].shape, makers[name])
            for name, norm in norms.items()
            if len(norm) == weights[name].shape[makers[name]]
        }
    found = opened(model, request, is_trusted=is_trusted, needs_targets=True, has_reference=False)
    with closing(found):
        gradients = found.calibration.gradients(list(held.values()), np.array)
        return {name: weights[name].astype(np.float64) * one for name, one in gradients.items()}


def _spread(line: Array, shape: tuple[int, ...], axis: int) -> Array:
    """Return numbers whose sum at each index of an axis is that of a line."""
    found = np.zeros(shape)
    first = tuple(slice(None) if number == axis else 0 for number in range(len(shape)))
    found[first] = line
    return found
