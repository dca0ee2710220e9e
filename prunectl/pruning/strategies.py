"""Strategies, built in or from users: they score weights, the lowest of which are pruned, or allocate sparsity."""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from prunectl.errors import PrunectlError, UsageError, WorkError
from prunectl.formats.base import Tensor

if TYPE_CHECKING:
    from prunectl.pruning.request import PruneRequest


Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class BlockContext:
    """Tensor and offset of a block of weights, for strategies that need them."""

    name: str
    """The name of the tensor."""
    begin: int
    """Index of the block's first element in the tensor."""
    seed: int


class Requires(StrEnum):
    """What a strategy needs besides the weights."""

    NOTHING = ""
    TRAINING = "training"
    GRADIENTS = "gradients"
    INPUTS = "inputs"
    """Norms of the layer inputs."""
    PRODUCTS = "products"
    """The Gram matrix of a layer's inputs."""


Score = Callable[[Array, BlockContext], Array]


@dataclass(frozen=True, slots=True)
class Strategy:
    """A way to score weights by importance."""

    name: str
    score: Score
    summary: str
    """What the strategy prunes, in a line."""
    is_elementwise: bool = True
    """Whether a weight's score depends on that weight alone, so that blocks can be scored one by one."""
    is_comparable: bool = False
    """Whether scores of different layers mean the same, so that they are ranked together by default."""
    is_unitless: bool = False
    """Whether the scores of a tensor stay the same if all its weights are scaled."""
    is_precomputed: bool = False
    """Whether the scores of all tensors are in memory already, so that none need be cached."""
    score_all: Callable[[Mapping[str, Array]], Mapping[str, Array | None]] | None = None
    """Scores all tensors at once, in place of `score`; the scores of a tensor that is not to be pruned are None."""
    allocation: Callable[..., Sequence[int]] | None = None
    """Number of weights to prune in each tensor, where the strategy decides it."""
    choices: Mapping[str, tuple[str, ...] | float] = field(default_factory=dict)
    """Parameters of a built-in strategy: each with the words that it takes, of which the first is the default, or with
    a number as its default."""
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
    bits = _splitmix64(indices + np.uint64(_fnv1a(f"{context.seed}/{context.name}")))
    # The upper 24 bits are as many as a float32 holds exactly.
    return (bits >> np.uint64(40)).astype(np.float32).reshape(weights.shape)


def _needs_data(_: Array, context: BlockContext) -> Array:
    raise ValueError(f"the scores of {context.name} need data that was not collected")


BIASES = ("late", "early", "uniform")
_BIAS_ODDS = (0.3, 0.6)
"""A random number below the first chooses late layers, below the second early layers, else uniform."""


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
    # The weights lost to rounding down go to the largest remainders.
    for index in sorted(rest, key=lambda index: (int(ideal[index]) - ideal[index], index))[: total - sum(counts)]:
        counts[index] += 1
    return counts


def erk(tensors: Sequence[Tensor], drop: int) -> Sequence[int]:
    """Counts by Erdos-Renyi-Kernel (RigL, Evci et al. 2020): density is proportional to sum(shape) / prod(shape)."""
    sizes = [tensor.size for tensor in tensors]
    densities = [(sum(tensor.shape) or 1) / tensor.size for tensor in tensors]
    kept = proportional_counts(sizes, densities, sum(sizes) - drop)
    return [size - keep for size, keep in zip(sizes, kept, strict=True)]


def depth_biased(tensors: Sequence[Tensor], drop: int, *, seed: int, bias: str = "") -> Sequence[int]:
    """Counts by sparsities that rise or fall linearly from the first layer to the last, or are uniform."""
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
    number = float(uniform_numbers(1, f"{seed}/bias")[0])
    return BIASES[sum(number >= odds for odds in _BIAS_ODDS)]


STRATEGIES = (
    Strategy("magnitude", magnitude, "the smallest absolute values", is_comparable=True),
    Strategy("random", random, "random weights, chosen by --seed", is_unitless=True),
    Strategy(
        "random-weighted",
        random,
        "random weights, more in late or in early layers, or evenly (bias=late, early, uniform; else --seed draws)",
        is_unitless=True,
        allocation=depth_biased,
        choices={"bias": BIASES},
    ),
    Strategy(
        "lamp",
        lamp,
        "the smallest square over the sum of squares not below it in the layer (LAMP, Lee et al. 2021)",
        is_elementwise=False,
        is_comparable=True,
        is_unitless=True,
    ),
    Strategy("gradient", _needs_data, "the smallest mean |gradient|", needs=Requires.GRADIENTS),
    Strategy(
        "magnitude-gradient",
        _needs_data,
        "the smallest |weight| times mean |gradient|; in finetune, since the last pruning step",
        is_comparable=True,
        needs=Requires.GRADIENTS,
    ),
    Strategy(
        "snip",
        _needs_data,
        "the smallest |weight times mean gradient| (SNIP, Lee et al. 2019)",
        is_comparable=True,
        needs=Requires.GRADIENTS,
    ),
    Strategy(
        "fisher",
        _needs_data,
        "the smallest squared weight times mean squared gradient (empirical Fisher, per batch)",
        is_comparable=True,
        needs=Requires.GRADIENTS,
    ),
    Strategy(
        "activation-magnitude",
        _needs_data,
        "the smallest |weight| times norm of its input, ranked per output (Wanda, Sun et al. 2023)",
        choices={"norm": ("2", "1")},
        needs=Requires.INPUTS,
    ),
    Strategy(
        "obs",
        _needs_data,
        "the smallest output error once the kept weights are updated (SparseGPT, Frantar & Alistarh 2023)",
        choices={"damp": 0.01, "blocksize": 128, "stages": 1},
        needs=Requires.PRODUCTS,
    ),
    Strategy(
        "alps",
        _needs_data,
        "the smallest output error of each layer, found by ADMM: slower than obs, better from 70 % on (ALPS, 2024)",
        choices={"damp": 0.01, "stages": 1},
        needs=Requires.PRODUCTS,
    ),
    Strategy(
        "movement",
        _needs_data,
        "weights that training moves towards zero (movement pruning, Sanh et al. 2020)",
        needs=Requires.TRAINING,
    ),
)


def uniform_numbers(count: int, key: str) -> NDArray[np.float64]:
    """Random numbers in [0, 1) that depend only on a key, not on the machine or the version of NumPy."""
    bits = _splitmix64(np.arange(count, dtype=np.uint64) + np.uint64(_fnv1a(key)))
    # The upper 53 bits are as many as a float64 holds exactly.
    return (bits >> np.uint64(11)).astype(np.float64) / 2**53


def _splitmix64(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The splitmix64 finaliser of each number (Steele, Lea and Flood 2014)."""
    with np.errstate(over="ignore"):
        bits = numbers * np.uint64(0x9E3779B97F4A7C15)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def _fnv1a(text: str) -> int:
    """The FNV-1a hash of a text, in 62 bits to leave room for indices."""
    digest = 0xCBF29CE484222325
    for byte in text.encode():
        digest = (digest ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return digest >> 2


def adapt_strategy(plugin: object, request: PruneRequest) -> Strategy:
    """A built-in strategy with its parameters bound, or a user's function from weights to scores as a strategy."""
    if isinstance(plugin, Strategy):
        return replace(plugin, params=_builtin_params(plugin, request.params))
    if not callable(plugin):
        raise UsageError(f"{request.strategy} is not a function from weights to scores")
    function: Callable[..., Any] = plugin
    params = bind_params(request.params, function)
    summary = inspect.getdoc(function) or ""

    def score(weights: Array, context: BlockContext) -> Array:
        scores = call_plugin(function, request.strategy, context.name, _at_least_float32(weights), **params)
        return _validated(scores, weights, request, context.name)

    def score_all(weights: Mapping[str, Array]) -> Mapping[str, Array | None]:
        wide = {name: _at_least_float32(array) for name, array in weights.items()}
        scores = call_plugin(function, request.strategy, "the model", wide, **params)
        if not isinstance(scores, Mapping) or scores.keys() - weights.keys():
            raise WorkError(
                f"{request.strategy} must return a dictionary whose keys are the names of the tensors it was given"
            )
        return {
            name: None if scores.get(name) is None else _validated(scores[name], array, request, name)
            for name, array in weights.items()
        }

    if getattr(function, "prunectl_scope", "") == "model":
        return Strategy(request.strategy, score, summary, score_all=score_all)
    return Strategy(request.strategy, score, summary, bool(getattr(function, "is_elementwise", False)))


def _builtin_params(strategy: Strategy, texts: tuple[str, ...]) -> Mapping[str, Any]:
    """The parameters of a built-in strategy."""
    params: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if not strategy.choices:
            raise UsageError(f"the strategy {strategy.name} takes no --param")
        if name not in strategy.choices:
            raise UsageError(
                f"the strategy {strategy.name} has no parameter {name}",
                did_you_mean=tuple(get_close_matches(name, strategy.choices)),
                hint=f"parameters: {', '.join(strategy.choices)}",
            )
        choices = strategy.choices[name]
        if isinstance(choices, int | float):
            params[name] = _number(strategy, name, value, choices)
            continue
        if value not in choices:
            raise UsageError(
                f"{value!r} is not a {name} of the strategy {strategy.name}",
                did_you_mean=tuple(get_close_matches(value, choices)),
                hint=f"choose one of {', '.join(choices)}",
            )
        params[name] = value
    return params


def _number(strategy: Strategy, name: str, text: str, default: float) -> float:
    try:
        number = type(default)(text)
    except ValueError:
        number = -1
    if not 0 < number < math.inf:
        raise UsageError(
            f"{name} of {strategy.name} must be a number above zero, not {text!r}", hint=f"the default is {default:g}"
        )
    return number


def _at_least_float32(weights: Array) -> Array:
    """Weights in at least 32 bits, since plugins may not support narrower types."""
    return weights.astype(np.float32) if weights.dtype.itemsize < 4 else weights


def call_plugin(function: Callable[..., Any], strategy: str, subject: str, *weights: Any, **params: Any) -> Any:
    """Call a plugin; an exception in it becomes a WorkError that names it."""
    try:
        return function(*weights, **params)
    except PrunectlError:
        raise
    except Exception as error:
        raise WorkError(f"{strategy} raised {type(error).__name__} on {subject}: {error}") from error


def bind_params(texts: tuple[str, ...], function: Callable[..., Any]) -> Mapping[str, Any]:
    """`name=value` texts as keyword arguments of a function, converted by its annotations."""
    accepted = dict(list(inspect.signature(function).parameters.items())[1:])
    params: dict[str, Any] = {}
    for item in texts:
        name, sign, text = item.partition("=")
        if not sign:
            raise UsageError(f"{item!r} is not a parameter", hint="write --param name=value")
        if name not in accepted:
            raise UsageError(
                f"the strategy has no parameter {name}",
                did_you_mean=tuple(get_close_matches(name, accepted)),
                hint=f"parameters: {', '.join(accepted) or 'none'}",
            )
        params[name] = _parse_value(name, text, _annotation(accepted[name]))
    missing = [
        name for name, parameter in accepted.items() if parameter.default is parameter.empty and name not in params
    ]
    if missing:
        raise UsageError(f"the strategy needs the parameter {missing[0]}", hint=f"write --param {missing[0]}=...")
    return params


def _annotation(parameter: inspect.Parameter) -> str:
    """The name of a parameter's type, from its annotation or its default; empty if it has neither."""
    annotation = parameter.annotation
    if annotation is parameter.empty:
        return "" if parameter.default in (parameter.empty, None) else type(parameter.default).__name__
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")


def parse_literal(text: str) -> Any:
    """The value of a Python literal, also `true`, `false` and `none`; other text is returned as it is."""
    try:
        return ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text.lower(), text))
    except (ValueError, SyntaxError):
        return text


def _parse_value(name: str, text: str, kind: str) -> Any:
    if kind == "str":
        return text
    parsed = parse_literal(text)
    if kind == "float" and type(parsed) is int:
        return float(parsed)
    if kind in {"int", "float", "bool"} and type(parsed).__name__ != kind:
        raise UsageError(f"the parameter {name} must be of type {kind}, not {text!r}")
    return parsed


def _validated(scores: Any, weights: Array, request: PruneRequest, name: str) -> Array:
    """Check a plugin's scores: of the weights' shape, numbers, none of them negative; return them as float64."""
    array = np.asarray(scores)
    if array.shape != weights.shape:
        raise WorkError(
            f"{request.strategy} returned scores of shape {array.shape} for {name}, whose weights have {weights.shape}"
        )
    if array.dtype.kind not in "fiub":
        raise WorkError(f"{request.strategy} returned scores for {name} that are not numbers")
    # All in float64, so that the scores of several tensors can be ranked together.
    array = array.astype(np.float64)
    if (array < 0).any():
        raise WorkError(f"{request.strategy} returned a negative score for {name}")
    if request.nan == "error" and not np.isfinite(array).all() and np.isfinite(weights).all():
        raise WorkError(
            f"{request.strategy} returned scores for {name} that are NaN or infinite",
            hint="--nan keep never prunes the weights with these scores, --nan zero always prunes them",
        )
    return array
