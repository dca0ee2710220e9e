"""One way to prune, and what came of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple
from urllib.parse import quote


class Way(NamedTuple):
    """What a sparsity is reached by."""

    strategy: str
    scope: str
    schedule: str = ""
    """Empty where nothing is trained."""
    pattern: str = ""
    """Empty for single weights."""
    params: str = ""
    """Of the strategy, with commas."""

    def at(self, sparsity: float) -> Point:
        """Return the point at a sparsity."""
        return Point(self.strategy, self.scope, self.schedule, sparsity, self.pattern, self.params)


@dataclass(frozen=True, slots=True)
class Point:
    """A way to prune, and how much of the model goes."""

    strategy: str
    scope: str
    schedule: str
    """Empty where nothing is trained."""
    sparsity: float
    pattern: str = ""
    params: str = ""

    @property
    def way(self) -> Way:
        """What the sparsity is reached by."""
        return Way(self.strategy, self.scope, self.schedule, self.pattern, self.params)

    @property
    def name(self) -> str:
        """The folder of the point."""
        words = (*self.way, f"{100 * self.sparsity:.4g}")
        return "-".join(quote(word, safe=":=,") for word in words if word) if self != BASE else "base"


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
