"""Strategies that watch training: what they gather, and how it becomes scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunectl.pruning.strategies import Place, Strategy

Array = NDArray[Any]


class Evidence(StrEnum):
    """What is added up over the steps since the last turn, for each weight w with gradient g."""

    NONE = ""
    GRADIENT = "gradient"
    """g"""
    SALIENCE = "salience"
    """|w * g|"""
    MOVEMENT = "movement"
    """-w * g, over all of training: how far a weight moved away from zero"""


WATCHED: Mapping[str, Evidence] = {
    "magnitude-gradient": Evidence.SALIENCE,
    "movement": Evidence.MOVEMENT,
}
"""What the strategies that watch training look at."""


def informed(strategy: Strategy, found: Mapping[str, Array], kept: Mapping[str, Array]) -> Strategy:
    """Return a strategy whose scores are the evidence; what is zero already goes first."""
    # One shift for all tensors keeps their order, and scores must not be negative.
    least = min((float(array.min()) for array in found.values() if array.size), default=0.0)
    scores = {
        name: np.where(kept[name], array.astype(np.float64) - least + np.finfo(np.float64).tiny, 0.0)
        if name in kept
        else array.astype(np.float64) - least
        for name, array in found.items()
    }

    def score(_: Array, place: Place) -> Array:
        return scores[place.name]

    return replace(strategy, score=score, is_elementwise=False, is_known=True)
