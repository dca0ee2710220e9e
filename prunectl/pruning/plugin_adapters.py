"""Strategies and policies that somebody else wrote: plain functions, made to fit."""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import numpy as np

from prunectl.errors import PrunectlError, UsageError, WorkError
from prunectl.formats.base import ModelFile, Tensor
from prunectl.pruning.policies import Policy
from prunectl.pruning.strategies import Array, BlockContext, Strategy

if TYPE_CHECKING:
    from prunectl.pruning.request import PruneRequest


def adapt_strategy(found: object, request: PruneRequest) -> Strategy:
    """Return a built-in strategy with its parameters, or one made of a function from weights to scores."""
    if isinstance(found, Strategy):
        return replace(found, params=_builtin_params(found, request.params))
    if not callable(found):
        raise UsageError(f"{request.strategy} is not a function from weights to scores")
    function: Callable[..., Any] = found
    params = bind_params(request.params, function)
    line = inspect.getdoc(function) or ""

    def score(weights: Array, place: BlockContext) -> Array:
        given = _call_plugin(function, request.strategy, place.name, _wide(weights), **params)
        return _validated(given, weights, request.strategy, place.name)

    def score_all(weights: Mapping[str, Array]) -> Mapping[str, Array | None]:
        wide = {name: _wide(array) for name, array in weights.items()}
        given = _call_plugin(function, request.strategy, "the model", wide, **params)
        if not isinstance(given, Mapping) or given.keys() - weights.keys():
            raise WorkError(f"{request.strategy} must give a dictionary with the names of the tensors that it got")
        return {
            name: None if given.get(name) is None else _validated(given[name], array, request.strategy, name)
            for name, array in weights.items()
        }

    if getattr(function, "prunectl_scope", "") == "model":
        return Strategy(request.strategy, score, line, score_all=score_all)
    return Strategy(request.strategy, score, line, bool(getattr(function, "is_elementwise", False)))


def _builtin_params(strategy: Strategy, words: tuple[str, ...]) -> Mapping[str, Any]:
    """Return the parameters of a built-in strategy."""
    found: dict[str, Any] = {}
    for word in words:
        name, _, value = word.partition("=")
        if not strategy.choices:
            raise UsageError(f"the strategy {strategy.name} takes no --param")
        if name not in strategy.choices:
            raise UsageError(
                f"the strategy {strategy.name} has no parameter {name}",
                did_you_mean=tuple(get_close_matches(name, strategy.choices)),
                hint=f"it takes {', '.join(strategy.choices)}",
            )
        known = strategy.choices[name]
        if isinstance(known, int | float):
            found[name] = _number(strategy, name, value, known)
            continue
        if value not in known:
            raise UsageError(
                f"{value!r} is no {name} of {strategy.name}",
                did_you_mean=tuple(get_close_matches(value, known)),
                hint=f"it is one of {', '.join(known)}",
            )
        found[name] = value
    return found


def _number(strategy: Strategy, name: str, text: str, default: float) -> float:
    try:
        found = type(default)(text)
    except ValueError:
        found = -1
    if not 0 < found < math.inf:
        raise UsageError(f"{name} of {strategy.name} is a number above zero, not {text!r}", hint=f"such as {default:g}")
    return found


def _wide(weights: Array) -> Array:
    """Return weights that any function can reckon with: half precision is widened."""
    return weights.astype(np.float32) if weights.dtype.itemsize < 4 else weights


def _call_plugin(function: Callable[..., Any], strategy: str, subject: str, *weights: Any, **params: Any) -> Any:
    """Return what somebody else's function returns; what it raises is its own fault."""
    try:
        return function(*weights, **params)
    except PrunectlError:
        raise
    except Exception as error:
        raise WorkError(f"{strategy} fails on {subject}: {type(error).__name__}: {error}") from error


def as_policy(found: object) -> Policy:
    """Return a built-in policy, or one made of a function from a tensor to why it is left alone."""
    if isinstance(found, Policy):
        return found
    if not callable(found):
        raise UsageError("a policy is a function from a tensor to the reason why it is not pruned, or to nothing")
    function: Callable[[Tensor], str | None] = found

    def judge(_: ModelFile) -> Callable[[Tensor], str]:
        return lambda tensor: str(
            _call_plugin(function, getattr(found, "__name__", "policy"), tensor.name, tensor) or ""
        )

    return Policy(getattr(found, "__name__", "policy"), judge, inspect.getdoc(found) or "")


def bind_params(words: tuple[str, ...], function: Callable[..., Any]) -> Mapping[str, Any]:
    """Return `name=value` words as arguments of a function, in the types that its signature says."""
    taken = dict(list(inspect.signature(function).parameters.items())[1:])
    found: dict[str, Any] = {}
    for word in words:
        name, sign, text = word.partition("=")
        if not sign:
            raise UsageError(f"{word!r} is not a parameter", hint="write --param name=value")
        if name not in taken:
            raise UsageError(
                f"the strategy has no parameter {name}",
                did_you_mean=tuple(get_close_matches(name, taken)),
                hint=f"it takes {', '.join(taken) or 'none'}",
            )
        found[name] = _value(name, text, _annotation(taken[name]))
    missing = [name for name, one in taken.items() if one.default is one.empty and name not in found]
    if missing:
        raise UsageError(f"the strategy needs a {missing[0]}", hint=f"write --param {missing[0]}=...")
    return found


def _annotation(parameter: inspect.Parameter) -> str:
    """Return the name of a parameter's type, from its annotation or its default; empty if neither tells."""
    said = parameter.annotation
    if said is parameter.empty:
        return "" if parameter.default in (parameter.empty, None) else type(parameter.default).__name__
    return said if isinstance(said, str) else getattr(said, "__name__", "")


def _value(name: str, text: str, kind: str) -> Any:
    if kind == "str":
        return text
    try:
        found = ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text.lower(), text))
    except (ValueError, SyntaxError):
        found = text
    if kind == "float" and type(found) is int:
        return float(found)
    if kind in {"int", "float", "bool"} and type(found).__name__ != kind:
        raise UsageError(f"{text!r} is no {kind}, as the parameter {name} is")
    return found


def _validated(scores: Any, weights: Array, strategy: str, name: str) -> Array:
    """Return scores that can be ranked: of the weights' shape, floats, none of them negative."""
    found = np.asarray(scores)
    if found.shape != weights.shape:
        raise WorkError(f"{strategy} gave {name} scores of shape {found.shape}, its weights have {weights.shape}")
    if found.dtype.kind not in "fiub":
        raise WorkError(f"{strategy} gave {name} scores that are no numbers")
    # All in one width, so that the scores of several tensors can be ranked together.
    found = found.astype(np.float64)
    if (found < 0).any():
        raise WorkError(f"{strategy} gave {name} a negative score")
    return found
