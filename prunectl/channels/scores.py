"""How much is each channel worth? Pure functions from weights to one number for each index of an axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial

import numpy as np
from numpy.typing import NDArray

from prunectl.channels.couple import Family
from prunectl.channels.similarity import METRICS, difference
from prunectl.channels.trace import Part
from prunectl.formats.base import Array
from prunectl.pruning.hashing import hashed, mixed

Scores = NDArray[np.float64]


class Needs(StrEnum):
    """What is measured on data."""

    NOTHING = "nothing"
    OUTPUTS = "outputs"
    GRADIENTS = "gradients"


@dataclass(frozen=True, slots=True)
class Measure:
    """A way to score channels by some of their weights."""

    name: str
    parts: frozenset[Part]
    of: Callable[[Array, int], Scores]
    """From a weight and an axis to one number for each index."""
    line: str
    key: str = ""
    """The parameter that tells which way to measure."""
    choices: Mapping[str, Callable[[Array, int], Scores]] = field(default_factory=dict)
    choice: str = ""
    needs: Needs = Needs.NOTHING
    """What of the data it is that takes the place of weights."""
    has_threshold: bool = False
    """Whether a number by itself says that a channel may go: 1 less the threshold."""


def absolute(weights: Array, axis: int) -> Scores:
    """Return the mean absolute value at each index."""
    return np.asarray(np.abs(rows_of(weights, axis)).mean(axis=1))


def squared(weights: Array, axis: int) -> Scores:
    """Return the mean square at each index."""
    return np.asarray(np.square(rows_of(weights, axis)).mean(axis=1))


def to_the_others(weights: Array, axis: int) -> Scores:
    """Return how far each index is from all others: the nearer, the better they replace it (He et al. 2019)."""
    rows = rows_of(weights, axis)
    squares = np.square(rows).sum(axis=1)
    apart = squares[:, None] + squares[None, :] - 2 * (rows @ rows.T)
    return np.asarray(np.sqrt(np.maximum(apart, 0)).sum(axis=1))


def summed(weights: Array, axis: int) -> Scores:
    """Return the absolute value of the sum at each index."""
    return np.asarray(np.abs(rows_of(weights, axis).sum(axis=1)))


MEASURES = (
    Measure(
        "channel-norm",
        frozenset({Part.OUT, Part.IN}),
        absolute,
        "the smallest weights, on average over all that makes or reads a channel",
        key="norm",
        choices={"1": absolute, "2": squared},
    ),
    Measure("bn-scale", frozenset({Part.SCALE}), absolute, "the smallest scales of batch normalisation"),
    Measure("geometric-median", frozenset({Part.OUT}), to_the_others, "those that the others can best replace"),
    Measure(
        "similarity",
        frozenset({Part.OUT}),
        difference,
        "those that are most like another that stays",
        key="metric",
        choices={metric: partial(difference, metric=metric) for metric in METRICS},
        has_threshold=True,
    ),
    Measure(
        "channel-activation",
        frozenset({Part.OUT}),
        summed,
        "the smallest outputs on your data",
        key="norm",
        choices={"1": summed, "2": summed},
        needs=Needs.OUTPUTS,
    ),
    Measure(
        "taylor",
        frozenset({Part.OUT}),
        summed,
        "the least that the loss would change, to first order",
        needs=Needs.GRADIENTS,
    ),
)
RANDOM = "random"


def of_family(family: Family, weights: Mapping[str, Array], measure: Measure) -> Scores | None:
    """Return a score for each channel of a family, the mean over its members; None if it has none to look at.

    Of a measure that needs data, the weights are what was seen of them.
    """
    kept = [
        number for number, place in enumerate(family.places) if place.part in measure.parts and place.tensor in weights
    ]
    if not kept:
        return None
    found = []
    for number in kept:
        place = family.places[number]
        line = measure.of(weights[place.tensor], place.axis)
        found.append(_means(line, [group.members[number].indices for group in family.groups]))
    return np.asarray(np.mean(found, axis=0))


def _means(line: Scores, indices: Sequence[tuple[int, ...]]) -> Scores:
    """Return the mean of the scores at the indices of each channel."""
    if all(len(own) == 1 for own in indices):
        return line[[own[0] for own in indices]]
    return np.asarray([line[list(own)].mean() for own in indices])


def at_random(family: Family, seed: int) -> Scores:
    """Return numbers that only the seed, the family and the place in it decide."""
    start = np.uint64(hashed(f"{seed}/{family.name}"))
    drawn = mixed(np.arange(len(family.groups), dtype=np.uint64) + start)
    # Of the upper 53 bits, as many as a float64 holds exactly; above zero, as they are divided by their mean.
    return (drawn >> np.uint64(11)).astype(np.float64) / 2**53


def rows_of(weights: Array, axis: int) -> NDArray[np.float64]:
    """Return the weights at each index of an axis as a row."""
    return np.moveaxis(weights, axis, 0).reshape(weights.shape[axis], -1).astype(np.float64)
