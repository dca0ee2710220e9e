"""One way to prune, and what came of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import product
from typing import Any
from urllib.parse import quote

from prunectl.sweeping.choices import Choices

Way = tuple[str, str, str]
"""A strategy, a scope and a schedule: what a sparsity is reached by."""


@dataclass(frozen=True, slots=True)
class Point:
    """A way to prune, and how much of the model goes."""

    strategy: str
    scope: str
    schedule: str
    """Empty where nothing is trained."""
    sparsity: float

    @property
    def way(self) -> Way:
        """What the sparsity is reached by."""
        return self.strategy, self.scope, self.schedule

    @property
    def name(self) -> str:
        """The folder of the point."""
        words = (self.strategy, self.scope, self.schedule, f"{100 * self.sparsity:.4g}")
        return "-".join(quote(word, safe=":") for word in words if word) if self != BASE else "base"


BASE = Point("", "", "", 0.0)
"""The model as it is."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How good a model is, and how big."""

    metric: str
    value: float
    logs: dict[str, float]
    """The loss and every metric."""
    sparsity: float
    """Of all parameters."""
    raw: int
    gzip: int
    path: str
    """Relative to the folder of the sweep; empty for the model as it is."""
    notes: tuple[str, ...] = ()

    @property
    def as_json(self) -> dict[str, Any]:
        """The outcome as it is noted."""
        return asdict(self)

    @classmethod
    def of_json(cls, said: dict[str, Any]) -> Outcome:
        """Return the outcome that was noted."""
        return cls(**{**said, "notes": tuple(said["notes"])})


def ways(choices: Choices) -> list[Way]:
    """Return every way in which a sparsity is to be reached."""
    schedules = choices.schedules if choices.epochs else ("",)
    return list(product(choices.strategies, choices.scopes, schedules))


def grid(choices: Choices) -> list[Point]:
    """Return the points that are asked for, the model as it is before them."""
    return [BASE, *(Point(*way, sparsity) for way in ways(choices) for sparsity in choices.sparsities)]
