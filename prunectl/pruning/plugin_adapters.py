"""Adapters that make strategies and policies of users' functions."""

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
from prunectl.pruning.plan import Policy
from prunectl.pruning.strategies import Array, BlockContext, Strategy

if TYPE_CHECKING:
    from prunectl.pruning.request import PruneRequest


def adapt_strategy(plugin: object, request: PruneRequest) -> Strategy:
    """A built-in strategy with its parameters bound, or a function from weights to scores wrapped as one."""
    if isinstance(plugin, Strategy):
        return replace(plugin, params=_builtin_params(plugin, request.params))
    if not callable(plugin):
        raise UsageError(f"{request.strategy} is not a function from weights to scores")
    function: Callable[..., Any] = plugin
    params = bind_params(request.params, function)
    summary = inspect.getdoc(function) or ""

    def score(weights: Array, context: BlockContext) -> Array:
        scores = _call_plugin(function, request.strategy, context.name, _at_least_float32(weights), **params)
        return _validated(scores, weights, request.strategy, context.name)

    def score_all(weights: Mapping[str, Array]) -> Mapping[str, Array | None]:
        wide = {name: _at_least_float32(array) for name, array in weights.items()}
        scores = _call_plugin(function, request.strategy, "the model", wide, **params)
        if not isinstance(scores, Mapping) or scores.keys() - weights.keys():
            raise WorkError(f"{request.strategy} must give a dictionary with the names of the tensors that it got")
        return {
            name: None if scores.get(name) is None else _validated(scores[name], array, request.strategy, name)
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
                hint=f"it takes {', '.join(strategy.choices)}",
            )
        choices = strategy.choices[name]
        if isinstance(choices, int | float):
            params[name] = _number(strategy, name, value, choices)
            continue
        if value not in choices:
            raise UsageError(
                f"{value!r} is no {name} of {strategy.name}",
                did_you_mean=tuple(get_close_matches(value, choices)),
                hint=f"it is one of {', '.join(choices)}",
            )
        params[name] = value
    return params


def _number(strategy: Strategy, name: str, text: str, default: float) -> float:
    try:
        number = type(default)(text)
    except ValueError:
        number = -1
    if not 0 < number < math.inf:
        raise UsageError(f"{name} of {strategy.name} is a number above zero, not {text!r}", hint=f"such as {default:g}")
    return number


def _at_least_float32(weights: Array) -> Array:
    """Weights in at least 32 bits, so that any function can compute with them."""
    return weights.astype(np.float32) if weights.dtype.itemsize < 4 else weights


def _call_plugin(function: Callable[..., Any], strategy: str, subject: str, *weights: Any, **params: Any) -> Any:
    """Call a plugin; an exception in it becomes a WorkError that names it."""
    try:
        return function(*weights, **params)
    except PrunectlError:
        raise
    except Exception as error:
        raise WorkError(f"{strategy} fails on {subject}: {type(error).__name__}: {error}") from error


def adapt_policy(plugin: object) -> Policy:
    """A built-in policy, or a function from a tensor to a reason to skip it wrapped as one."""
    if isinstance(plugin, Policy):
        return plugin
    if not callable(plugin):
        raise UsageError("a policy is a function from a tensor to the reason why it is not pruned, or to nothing")
    function: Callable[[Tensor], str | None] = plugin

    def skip_reasons(_: ModelFile) -> Callable[[Tensor], str]:
        return lambda tensor: str(
            _call_plugin(function, getattr(plugin, "__name__", "policy"), tensor.name, tensor) or ""
        )

    return Policy(getattr(plugin, "__name__", "policy"), skip_reasons, inspect.getdoc(plugin) or "")


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
                hint=f"it takes {', '.join(accepted) or 'none'}",
            )
        params[name] = _parse_value(name, text, _annotation(accepted[name]))
    missing = [
        name for name, parameter in accepted.items() if parameter.default is parameter.empty and name not in params
    ]
    if missing:
        raise UsageError(f"the strategy needs a {missing[0]}", hint=f"write --param {missing[0]}=...")
    return params


def _annotation(parameter: inspect.Parameter) -> str:
    """The name of a parameter's type, from its annotation or its default; empty if neither tells."""
    annotation = parameter.annotation
    if annotation is parameter.empty:
        return "" if parameter.default in (parameter.empty, None) else type(parameter.default).__name__
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")


def parse_literal(text: str) -> Any:
    """A Python literal as it is typed, `true` and `none` among them; anything else is a text."""
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
        raise UsageError(f"{text!r} is no {kind}, as the parameter {name} is")
    return parsed


def _validated(scores: Any, weights: Array, strategy: str, name: str) -> Array:
    """Scores that can be ranked: of the weights' shape, floats, none of them negative."""
    array = np.asarray(scores)
    if array.shape != weights.shape:
        raise WorkError(f"{strategy} gave {name} scores of shape {array.shape}, its weights have {weights.shape}")
    if array.dtype.kind not in "fiub":
        raise WorkError(f"{strategy} gave {name} scores that are no numbers")
    # All in one width, so that the scores of several tensors can be ranked together.
    array = array.astype(np.float64)
    if (array < 0).any():
        raise WorkError(f"{strategy} gave {name} a negative score")
    return array
