"""Which file holds the budgets? The nearest one, upwards from where we are."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunectl.errors import UsageError
from prunectl.gating.lines import Lines, scan

OWN, SHARED = "prunectl.toml", "pyproject.toml"


@dataclass(frozen=True, slots=True)
class Found:
    """The table of budgets in a file, not yet understood."""

    path: Path
    table: dict[str, Any]
    prefix: tuple[str, ...]
    """Where in the file it stands."""
    lines: Lines

    def line(self, *path: str | int) -> int:
        """Return the line of a key in the table."""
        return self.lines.of(*self.prefix, *path)

    def place(self, *path: str | int) -> str:
        """Return file and line of a key, as compilers write them."""
        return f"{os.path.relpath(self.path)}:{self.line(*path)}"


def nearest(folder: Path) -> Found:
    """Return the table of budgets in the nearest folder upwards that has one."""
    for place in (folder, *folder.parents):
        if (place / OWN).is_file():
            return opened(place / OWN)
        if (place / SHARED).is_file():
            found = opened(place / SHARED, is_shared=True)
            if found.table:
                return found
    raise UsageError(
        f"there is no {OWN} in {folder} or above it, nor a {SHARED} with [tool.prunectl]",
        hint="prunectl init writes one, with limits a little above what the models are now",
    )


def opened(path: Path, *, is_shared: bool | None = None) -> Found:
    """Return the table of budgets in a file."""
    try:
        text = path.read_text(encoding="utf-8")
        whole = tomllib.loads(text)
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist", hint="prunectl init writes one") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not TOML: {error}") from error
    if not (path.name == SHARED if is_shared is None else is_shared):
        return Found(path, whole, (), scan(text))
    tool = whole.get("tool", {})
    table = tool.get("prunectl", {}) if isinstance(tool, dict) else {}
    if not isinstance(table, dict):
        raise UsageError(f"{path}: tool.prunectl is not a table")
    return Found(path, table, ("tool", "prunectl"), scan(text))
