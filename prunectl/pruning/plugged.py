"""Strategies and policies that somebody else wrote: plain functions, made to fit."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import numpy as np

from prunectl.errors import UsageError, WorkError
from prunectl.formats.base import ModelFile, Tensor
from prunectl.pruning.policies import Policy
from prunectl.pruning.strategies import Array, Place, Strategy

if TYPE_CHECKING:
    from prunectl.pruning.request import Request


def as_strategy(found: object, request: Request) -> Strategy:
    """Return a built-in strategy, or one made of a function from weights to scores."""
    if isinstance(found, Strategy):
        if request.params:
            raise UsageError(f"the strategy {found.name} takes no --param")
        return found
    if not callable(found):
        raise UsageError(f"{request.strategy} is not a function from weights to scores")
    function: Callable[..., Any] = found
    params = typed(request.params, function)
    is_elementwise = bool(getattr(function, "is_elementwise", False))

    def score(weights: Array, place: Place) -> Array:
        return _checked(function(weights, **params), weights, request.strategy, place.name)

    return Strategy(request.strategy, score, inspect.getdoc(function) or "", is_elementwise)


def as_policy(found: object) -> Policy:
    """Return a built-in policy, or one made of a function from a tensor to why it is left alone."""
    if isinstance(found, Policy):
        return found
    if not callable(found):
        raise UsageError("a policy is a function from a tensor to the reason why it is not pruned, or to nothing")
    function: Callable[[Tensor], str | None] = found

    def judge(_: ModelFile) -> Callable[[Tensor], str]:
        return lambda tensor: function(tensor) or ""

    return Policy(getattr(found, "__name__", "policy"), judge, inspect.getdoc(found) or "")


def typed(words: tuple[str, ...], function: Callable[..., Any]) -> Mapping[str, Any]:
    """Return `name=value` words as arguments of a function: numbers as numbers, checked against its signature."""
    taken = list(inspect.signature(function).parameters)[1:]
    found: dict[str, Any] = {}
    for word in words:
        name, sign, text = word.partition("=")
        if not sign:
            raise UsageError(f"{word!r} is not a parameter", hint="write --param name=value")
        if name not in taken:
            raise UsageError(
                f"the strategy has no parameter {name}", did_you_mean=tuple(get_close_matches(name, taken))
            )
        found[name] = _value(text)
    return found


def _value(text: str) -> Any:
    try:
        return ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text.lower(), text))
    except (ValueError, SyntaxError):
        return text


def _checked(scores: Any, weights: Array, strategy: str, name: str) -> Array:
    """Return scores that can be ranked: of the weights' shape, floats, none of them negative."""
    found = np.asarray(scores)
    if found.shape != weights.shape:
        raise WorkError(f"{strategy} gave {name} scores of shape {found.shape}, its weights have {weights.shape}")
    found = found.astype(np.float64 if found.dtype.itemsize > 4 else np.float32)
    if (found < 0).any():
        raise WorkError(f"{strategy} gave {name} a negative score")
    return found
