"""Which budgets are meant, and which models are they about?"""

from __future__ import annotations

import glob
from fnmatch import fnmatchcase
from pathlib import Path

from prunectl.errors import UsageError
from prunectl.formats.names import nearest
from prunectl.formats.table import resolve
from prunectl.gating.budget import Budget, Budgets


def named(budgets: Budgets, names: list[str]) -> list[Budget]:
    """Return the budgets that names or globs mean; all of them if there are none."""
    known = [budget.name for budget in budgets.budgets]
    for name in names:
        if not any(_is_meant(one, name) for one in known):
            raise UsageError(
                f"{budgets.path} has no budget {name!r}",
                did_you_mean=nearest(name, known),
                hint=f"budgets: {', '.join(known)}",
            )
    return [one for one in budgets.budgets if not names or any(_is_meant(one.name, name) for name in names)]


def matched(folder: Path, budget: Budget) -> tuple[list[str], list[str]]:
    """Return the paths that a budget is about, from a folder, and its globs that match nothing."""
    found: dict[str, None] = {}
    empty = []
    for pattern in budget.paths:
        paths = sorted(glob.glob(pattern, root_dir=folder, recursive=True))
        # The prefix of a checkpoint is the name of no file.
        paths = paths or ([pattern] if resolve(folder / pattern).exists() else [])
        found.update(dict.fromkeys(Path(path).as_posix() for path in paths))
        empty += [] if paths else [pattern]
    return list(found), empty


def _is_meant(budget: str, name: str) -> bool:
    return budget == name or fnmatchcase(budget, name)
