"""What the commands say of their options alike."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import typer


def panel(title: str) -> Callable[..., Any]:
    """Return what makes options that `--help` shows together under a title."""
    return partial(typer.Option, rich_help_panel=title)


def is_typed(ctx: typer.Context, name: str) -> bool:
    """Whether an option was typed, and has its value not by default."""
    source: Any = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
