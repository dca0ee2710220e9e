"""One way to prune, and what came of it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple
from urllib.parse import quote

from prunectl.errors import PrunectlError
from prunectl.training.better import is_higher_better


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
    is_up: bool | None = None
    """Whether more of the metric is better; None is as its name says."""
    digest: str = ""
    """Of the model that was made."""

    @property
    def is_number(self) -> bool:
        """Whether the metric came to anything: what goes too far may answer with numbers that are none."""
        return math.isfinite(self.value)

    @property
    def is_more_better(self) -> bool:
        """Whether more of the metric is better."""
        return self.is_up if self.is_up is not None else is_higher_better(self.metric)

    @property
    def as_json(self) -> dict[str, Any]:
        """The outcome as it is noted."""
        return {**asdict(self), "value": self.value if self.is_number else None}

    @classmethod
    def of_json(cls, said: dict[str, Any]) -> Outcome:
        """Return the outcome that was noted."""
        value = math.nan if said["value"] is None else said["value"]
        return cls(**{**said, "value": value, "notes": tuple(said["notes"])})


def diverged(point: Point, error: PrunectlError) -> Outcome:
    """Return what came of a point whose training went astray: no model, and nothing to judge."""
    return Outcome("", math.nan, {}, 0.0, 0, 0, "", (f"{point.name}: {error.message}; {error.hint}.",))
