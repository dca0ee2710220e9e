"""What is typed after `export`, as a request."""

from __future__ import annotations

import importlib

import typer

from prunectl.errors import UsageError
from prunectl.exporting.request import Request
from prunectl.exporting.words import DEFAULTS, request_of


def export_of(ctx: typer.Context) -> Request:
    """Return the request that was typed; what is to be imported first is imported."""
    for module in ctx.params["imports"] or ():
        _import(module)
    said = {**ctx.params, "model": ctx.params["build"], "input": ctx.params["input_"]}
    return request_of({name: said[name] for name in DEFAULTS if said[name] is not None})


def _import(name: str) -> None:
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise UsageError(f"--import {name}: {error}", hint="is its folder in PYTHONPATH?") from error
