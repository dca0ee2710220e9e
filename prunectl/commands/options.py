"""What the commands say of their options alike."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import typer


def panel(title: str) -> Callable[..., Any]:
    """Return what makes options that `--help` shows together under a title."""
    return partial(typer.Option, rich_help_panel=title)


def spelled(ctx: typer.Context, name: str) -> str:
    """Return how an option is typed, in its longest form, by the name of its parameter: `--model` for `build`."""
    found = [word for param in ctx.command.params if param.name == name for word in param.opts]
    # A name that comes from a file may be that of no option.
    return max(found, key=len, default=name)


def is_typed(ctx: typer.Context, name: str) -> bool:
    """Whether an option was typed, and has its value not by default."""
    source: Any = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
