"""What is typed after `finetune`, as a request."""

from __future__ import annotations

import typer

from prunectl.commands.requests import import_first, layer_ratio
from prunectl.training.request import Request
from prunectl.training.words import DEFAULTS, request_of
from prunectl.units import parse_ratio

_RATIOS = ("sparsity", "initial_sparsity", "val_split")


def training_of(ctx: typer.Context) -> Request:
    """Return the request that was typed; what is to be imported first is imported."""
    import_first(ctx.params["imports"] or ())
    said = {**ctx.params, "model": ctx.params["build"], "compile": ctx.params["compile_"]}
    words = {name: said[name] for name in DEFAULTS if said[name] is not None}
    ratios = {name: parse_ratio(words[name]) for name in _RATIOS if words[name]}
    unsaid = {name: DEFAULTS[name] for name in _RATIOS}
    layers = tuple(map(layer_ratio, words.get("layer", ())))
    return request_of({**words, **unsaid, **ratios, "layer": layers})
