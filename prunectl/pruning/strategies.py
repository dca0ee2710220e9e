"""Strategies: functions from weights to importance scores; the lowest are pruned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunectl.pruning.hashing import fnv1a, splitmix64
from prunectl.pruning.plan import BIASES, depth_biased

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class BlockContext:
    """Tensor and offset of a block of weights, for strategies that need them."""

    name: str
    """The tensor."""
    begin: int
    """Index of the block's first element in the tensor."""
    seed: int


class Requires(StrEnum):
    """What a strategy needs besides the weights."""

    NOTHING = ""
    TRAINING = "training"
    GRADIENTS = "gradients"
    INPUTS = "inputs"
    """What each weight is multiplied with."""
    PRODUCTS = "products"
    """The Gram matrix of a layer's inputs."""


Score = Callable[[Array, BlockContext], Array]


@dataclass(frozen=True, slots=True)
class Strategy:
    """A way to score weights by importance."""

    name: str
    score: Score
    summary: str
    """What it does, in a line."""
    is_elementwise: bool = True
    """Whether a weight's score depends on that weight alone, so that blocks can be scored one by one."""
    is_precomputed: bool = False
    """Whether the scores of all tensors are in memory already, so that none need be cached."""
    score_all: Callable[[Mapping[str, Array]], Mapping[str, Array | None]] | None = None
    """Scores all tensors at once, in place of `score`; None for one that it leaves alone."""
    allocation: Callable[..., Sequence[int]] | None = None
    """Number of weights to prune in each tensor, where the strategy decides it."""
    choices: Mapping[str, tuple[str, ...] | float] = field(default_factory=dict)
    """Parameters of a built-in strategy, with the words that they take, the first of them if nothing is said; or with
    the number that they are then."""
    params: Mapping[str, Any] = field(default_factory=dict)
    needs: Requires = Requires.NOTHING


def magnitude(weights: Array, _: BlockContext) -> Array:
    """Score each weight by its absolute value."""
    wide = weights.astype(np.float32, copy=False) if weights.dtype.itemsize < 4 else weights
    return np.asarray(np.abs(wide))


def lamp(weights: Array, context: BlockContext) -> Array:
    """LAMP: each squared weight over the sum of the squares that are not smaller (Lee et al. 2021)."""
    squares = np.square(magnitude(weights, context).astype(np.float64)).reshape(-1)
    order = np.argsort(squares, kind="stable")
    rising = squares[order]
    remaining = np.cumsum(rising[::-1])[::-1]
    scores = np.empty_like(squares)
    scores[order] = np.divide(rising, remaining, out=np.zeros_like(rising), where=remaining > 0)
    return scores.reshape(weights.shape)


def random(weights: Array, context: BlockContext) -> Array:
    """Score each weight by a hash of its index, its tensor and the seed."""
    indices = np.arange(context.begin, context.begin + weights.size, dtype=np.uint64)
    bits = splitmix64(indices + np.uint64(fnv1a(f"{context.seed}/{context.name}")))
    # The upper 24 bits are as many as a float32 holds exactly.
    return (bits >> np.uint64(40)).astype(np.float32).reshape(weights.shape)


def _needs_data(_: Array, context: BlockContext) -> Array:
    raise ValueError(f"{context.name} is scored by what nobody has looked at")


STRATEGIES = (
    Strategy("magnitude", magnitude, "the smallest absolute values"),
    Strategy("random", random, "any, decided by the seed"),
    Strategy(
        "random-weighted",
        random,
        "any, more of them in early or in late layers, decided by the seed",
        allocation=depth_biased,
        choices={"bias": BIASES},
    ),
    Strategy("lamp", lamp, "the smallest shares of what is left of their layer", is_elementwise=False),
    Strategy("gradient", _needs_data, "the smallest mean |gradient|", needs=Requires.GRADIENTS),
    Strategy(
        "magnitude-gradient",
        _needs_data,
        "the smallest |weight| times mean |gradient|; in finetune since the last turn",
        needs=Requires.GRADIENTS,
    ),
    Strategy(
        "snip", _needs_data, "the smallest |weight times mean gradient| (Lee et al. 2019)", needs=Requires.GRADIENTS
    ),
    Strategy(
        "fisher", _needs_data, "the smallest weight squared times mean gradient squared", needs=Requires.GRADIENTS
    ),
    Strategy(
        "activation-magnitude",
        _needs_data,
        "the smallest |weight| times the norm of its input, output by output (Wanda)",
        choices={"norm": ("2", "1")},
        needs=Requires.INPUTS,
    ),
    Strategy(
        "obs",
        _needs_data,
        "what the others can best make up for, and they do (SparseGPT)",
        choices={"damp": 0.01, "blocksize": 128},
        needs=Requires.PRODUCTS,
    ),
    Strategy(
        "movement", _needs_data, "those that finetune moves towards zero (Sanh et al. 2020)", needs=Requires.TRAINING
    ),
)
