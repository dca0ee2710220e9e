"""What is typed after `finetune`, as a request."""

from __future__ import annotations

import importlib

import typer

from prunectl.commands.requests import layer_ratio
from prunectl.errors import UsageError
from prunectl.reporting.words import parse_ratio
from prunectl.training.request import Request
from prunectl.training.words import DEFAULTS, request_of

_RATIOS = ("sparsity", "initial_sparsity", "val_split")


def training_of(ctx: typer.Context) -> Request:
    """Return the request that was typed; what is to be imported first is imported."""
    for module in ctx.params["imports"] or ():
        _import(module)
    said = {**ctx.params, "model": ctx.params["build"], "compile": ctx.params["compile_"]}
    words = {name: said[name] for name in DEFAULTS if said[name] is not None}
    ratios = {name: parse_ratio(words[name]) for name in _RATIOS if words[name]}
    unsaid = {name: DEFAULTS[name] for name in _RATIOS}
    layers = tuple(map(layer_ratio, words.get("layer", ())))
    return request_of({**words, **unsaid, **ratios, "layer": layers})


def _import(name: str) -> None:
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise UsageError(f"--import {name}: {error}", hint="is its folder in PYTHONPATH?") from error
