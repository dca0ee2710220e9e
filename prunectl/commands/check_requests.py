"""What is typed after `check`: where the budgets are, and what models are compared with."""

from __future__ import annotations

import os
from pathlib import Path

from prunectl.errors import UsageError
from prunectl.gating import baseline, find
from prunectl.gating.baseline import GIT, Baseline
from prunectl.gating.budget import Budgets
from prunectl.gating.read import Words, read
from prunectl.units import parse_ratio, parse_size

_ROOTS = ("GITHUB_WORKSPACE", "CI_PROJECT_DIR")
"""Where services that run checks have the repository, from which they name files."""


def budgets_of(config: Path | None) -> Budgets:
    """Return the budgets of the file that was named, or of the nearest one."""
    found = find.nearest(Path.cwd()) if config is None else find.opened(config)
    return read(found, Words(parse_size, parse_ratio))


def baseline_of(budgets: Budgets, word: str, *, is_new: bool, reason: str) -> Baseline:
    """Return what models were, or where that is to be written."""
    if is_new and word.startswith(GIT):
        raise UsageError("a baseline in git is not written to", hint="--baseline FILE, and commit it")
    if is_new != bool(reason.strip()):
        raise UsageError(
            "--update-baseline and --reason go together", hint="--update-baseline --reason 'a better tokenizer'"
        )
    usual = budgets.folder / budgets.baseline
    return baseline.read(word, usual if not word or word.startswith(GIT) else Path(word))


def shown(path: Path) -> str:
    """Return a path as a service finds it in the repository; else from where we are."""
    for name in _ROOTS:
        root = os.environ.get(name, "")
        if root and path.absolute().is_relative_to(root):
            return path.absolute().relative_to(root).as_posix()
    return os.path.relpath(path)
