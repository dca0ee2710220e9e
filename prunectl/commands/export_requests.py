"""What is typed after `export`, as a request."""

from __future__ import annotations

import typer

from prunectl.commands.requests import import_first
from prunectl.exporting.request import Request
from prunectl.exporting.words import DEFAULTS, request_of


def export_of(ctx: typer.Context) -> Request:
    """Return the request that was typed; what is to be imported first is imported."""
    import_first(ctx.params["imports"] or ())
    said = {**ctx.params, "model": ctx.params["build"], "input": ctx.params["input_"]}
    return request_of({name: said[name] for name in DEFAULTS if said[name] is not None})
