"""What contradicts itself in a sweep, told before a file is opened."""

from __future__ import annotations

from prunectl.errors import UsageError
from prunectl.pruning.plan import Scope
from prunectl.sweeping.choices import Choices
from prunectl.sweeping.combined import grid, ways
from prunectl.sweeping.point import BASE
from prunectl.sweeping.requests import AT_ONCE, training_of
from prunectl.training.better import check_direction


def check(choices: Choices) -> None:
    """Refuse what contradicts itself."""
    if choices.val and choices.val_split:
        raise UsageError("--val and --val-split exclude each other")
    if choices.schedules != (AT_ONCE,) and not choices.epochs:
        raise UsageError("a schedule needs training", hint="add --epochs 3, or leave out --schedules")
    for scope in choices.scopes:
        if scope not in set(Scope):
            raise UsageError(f"no scope is called {scope}", hint=f"known: {', '.join(Scope)}")
    ways(choices)
    check_direction(training_of(choices, BASE).means)
    for point in grid(choices)[1:]:
        if not 0 <= point.sparsity < 1:
            raise UsageError(f"a sparsity is a share from 0 up to 1, not {point.sparsity:g}", hint="write 0.8 or 80%")
