"""What is typed after `--metric`: names of metrics, and where the one that decides is best."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypedDict

from prunectl.errors import UsageError

MAX, MIN, LOSS = "max", "min", "loss"


class Asked(TypedDict):
    """The part of `Means` that is about metrics."""

    metrics: tuple[str, ...]
    """What is measured beside the loss."""
    decides: str
    """The first that was named; it may be the loss."""
    goal: str
    """`max` or `min`, where it was said."""


def asked(words: Iterable[str]) -> Asked:
    """Return what `accuracy`, `loss`, `./file.py:score:max` … ask for; the first of them decides."""
    parts = [_parted(word.strip()) for word in words if word.strip()]
    for name, goal in parts[1:]:
        if goal:
            raise UsageError(
                f"{name} does not decide: the first metric does, which is {parts[0][0]}",
                hint=f"leave out :{goal}, or name it first",
            )
    decides, goal = parts[0] if parts else ("", "")
    return Asked(metrics=tuple(name for name, _ in parts if name != LOSS), decides=decides, goal=goal)


def _parted(word: str) -> tuple[str, str]:
    """Return a name, and what stands behind it of the direction; `./file.py:max` is a function called max."""
    name, _, goal = word.rpartition(":")
    return (name, goal) if goal in {MAX, MIN} and name and not name.endswith(".py") else (word, "")
