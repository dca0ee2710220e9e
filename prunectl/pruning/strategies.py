"""Strategies: importance scores of weights, the lowest of which are pruned, and how much of each layer that takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from prunectl.formats.base import Tensor

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


BIASES = ("late", "early", "uniform")
_BIAS_ODDS = (0.3, 0.6)
"""Up to the first of these numbers late layers lose most, up to the second early ones."""


def proportional_counts(sizes: Sequence[int], rates: Sequence[float], total: int) -> list[int]:
    """Counts proportional to size times rate, capped at the size, that sum to the total (largest remainders)."""
    saturated: set[int] = set()
    while True:
        rest = [index for index in range(len(sizes)) if index not in saturated]
        left = total - sum(sizes[index] for index in saturated)
        mass = sum(sizes[index] * rates[index] for index in rest)
        above = {index for index in rest if rates[index] * left > mass}
        if not above:
            break
        saturated |= above
    ideal = {index: sizes[index] * rates[index] * left / mass for index in rest} if left else dict.fromkeys(rest, 0.0)
    counts = [sizes[index] if index in saturated else int(ideal[index]) for index in range(len(sizes))]
    # What rounding down left over goes to the largest remainders.
    for index in sorted(rest, key=lambda index: (int(ideal[index]) - ideal[index], index))[: total - sum(counts)]:
        counts[index] += 1
    return counts


def erk(tensors: Sequence[Tensor], drop: int) -> Sequence[int]:
    """Counts by Erdos-Renyi-Kernel (RigL, Evci et al. 2020): density goes with a shape's sum over its product."""
    sizes = [tensor.size for tensor in tensors]
    densities = [(sum(tensor.shape) or 1) / tensor.size for tensor in tensors]
    kept = proportional_counts(sizes, densities, sum(sizes) - drop)
    return [size - keep for size, keep in zip(sizes, kept, strict=True)]


def depth_biased(tensors: Sequence[Tensor], drop: int, *, seed: int, bias: str = "") -> Sequence[int]:
    """Counts that rise or fall evenly from the first layer to the last, or that are the same share of each."""
    layers = list(dict.fromkeys(tensor.layer for tensor in tensors))
    depths = [layers.index(tensor.layer) for tensor in tensors]
    rates = {
        "late": [1.0 + depth for depth in depths],
        "early": [float(len(layers) - depth) for depth in depths],
        "uniform": [1.0] * len(depths),
    }[bias or sample_depth_bias(seed)]
    return proportional_counts([tensor.size for tensor in tensors], rates, drop)


def sample_depth_bias(seed: int) -> str:
    """The bias drawn by a seed: late or early with odds of 30 % each, else uniform."""
    number = float(splitmix64(fnv1a(f"{seed}/bias")) >> 11) / (1 << 53)
    return BIASES[sum(number >= odds for odds in _BIAS_ODDS)]


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


@overload
def splitmix64(numbers: int) -> int: ...
@overload
def splitmix64(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]: ...
def splitmix64(numbers: int | NDArray[np.uint64]) -> int | NDArray[np.uint64]:
    """The splitmix64 finaliser of each number (Steele, Lea and Flood 2014)."""
    if isinstance(numbers, int):
        return int(splitmix64(np.array([numbers], np.uint64))[0])
    with np.errstate(over="ignore"):
        bits = numbers * np.uint64(0x9E3779B97F4A7C15)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def fnv1a(text: str) -> int:
    """The FNV-1a hash of a text, in 62 bits to leave room for indices."""
    digest = 0xCBF29CE484222325
    for byte in text.encode():
        digest = (digest ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return digest >> 2
