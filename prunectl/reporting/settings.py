"""How the user wants to be talked to."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from enum import StrEnum

from prunectl.units import Units

DEFAULT_ROWS = 40
"""How many rows of a table are shown on a terminal unless the user says so."""


class Layout(StrEnum):
    """How a report is printed."""

    HUMAN = "human"
    PLAIN = "plain"
    JSON = "json"
    CSV = "csv"
    MARKDOWN = "markdown"


class Color(StrEnum):
    """When to colour."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class Settings:
    """Every choice about output, made once."""

    layout: Layout | None = None
    is_quiet: bool = False
    is_verbose: bool = False
    color: Color = Color.AUTO
    has_progress: bool = True
    rows: int = DEFAULT_ROWS
    units: Units = Units.SI

    @property
    def chosen_layout(self) -> Layout:
        """The layout asked for; else tables for a terminal, rows for a pipe."""
        return self.layout or (Layout.HUMAN if sys.stdout.isatty() else Layout.PLAIN)

    def colors(self, *, is_terminal: bool) -> bool:
        """Whether a stream gets colours: the option first, then the habits of the environment."""
        if self.color is not Color.AUTO:
            return self.color is Color.ALWAYS
        if os.environ.get("NO_COLOR"):
            return False
        if os.environ.get("FORCE_COLOR"):
            return True
        return is_terminal and os.environ.get("TERM") != "dumb"
