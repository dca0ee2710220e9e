"""The one factory of consoles: width, colour and encoding are decided here."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console

    from prunectl.reporting.settings import Settings

_WIDE = 10_000
"""Off a terminal nothing is cropped."""
_HEIGHT = 25
"""Rich heeds an explicit width under TERM=dumb only beside an explicit height."""


def console(stream: TextIO, settings: Settings) -> Console:
    """Return a console for a stream."""
    from rich.console import Console  # noqa: PLC0415 - 40 ms that plain rows and JSON do not need

    never_fail(stream)
    is_terminal = stream.isatty()
    width = os.environ.get("COLUMNS", "")
    if not width.isdecimal() or not int(width):
        width = str(_terminal_width(stream) if is_terminal else _WIDE)
    has_colors = settings.colors(is_terminal=is_terminal)
    return Console(
        file=stream,
        width=int(width),
        height=_HEIGHT,
        force_terminal=has_colors or is_terminal,
        no_color=not has_colors,
        color_system="auto" if has_colors and is_terminal else "standard" if has_colors else None,
        markup=False,
        highlight=False,
        emoji=False,
        legacy_windows=False,
    )


def never_fail(stream: TextIO) -> None:
    """Let a stream show what its encoding cannot, escaped."""
    if stream in {sys.stdout, sys.stderr} and hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")


def _terminal_width(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except OSError:
        return 80
