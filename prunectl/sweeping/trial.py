"""Trials of a sweep, their results, and the sweep's configuration."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple
from urllib.parse import quote

from prunectl.errors import PrunectlError
from prunectl.pruning import BATCH_SIZE, SAMPLES
from prunectl.pruning.plan import Scope
from prunectl.training.monitor import resolve_direction


class Variant(NamedTuple):
    """A combination of strategy, scope, schedule and pattern."""

    strategy: str
    scope: str
    schedule: str = ""
    """Empty where nothing is trained."""
    pattern: str = ""
    """Empty for single weights."""
    params: str = ""
    """Of the strategy, with commas."""

    def trial(self, sparsity: float) -> Trial:
        """The point at a sparsity."""
        return Trial(self.strategy, self.scope, self.schedule, sparsity, self.pattern, self.params)


@dataclass(frozen=True, slots=True)
class Trial:
    """A variant at a sparsity."""

    strategy: str
    scope: str
    schedule: str
    """Empty where nothing is trained."""
    sparsity: float
    pattern: str = ""
    params: str = ""

    @property
    def variant(self) -> Variant:
        """What the sparsity is reached by."""
        return Variant(self.strategy, self.scope, self.schedule, self.pattern, self.params)

    @property
    def name(self) -> str:
        """The folder of the point."""
        parts = (*self.variant, f"{100 * self.sparsity:.4g}")
        return "-".join(quote(part, safe=":=,") for part in parts if part) if self != BASELINE else "base"


BASELINE = Trial("", "", "", 0.0)
"""The model as it is."""


@dataclass(frozen=True, slots=True)
class TrialResult:
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
    def higher_is_better(self) -> bool:
        """Whether more of the metric is better."""
        return self.is_up if self.is_up is not None else resolve_direction(self.metric)

    @property
    def as_json(self) -> dict[str, Any]:
        """The outcome as it is noted."""
        return {**asdict(self), "value": self.value if self.is_number else None}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TrialResult:
        """The outcome that was noted."""
        value = math.nan if data["value"] is None else data["value"]
        return cls(**{**data, "value": value, "notes": tuple(data["notes"])})


def diverged(point: Trial, error: PrunectlError) -> TrialResult:
    """The result of a trial that diverged: no model, and nothing to evaluate."""
    return TrialResult("", math.nan, {}, 0.0, 0, 0, "", (f"{point.name}: {error.message}; {error.hint}.",))


@dataclass(frozen=True, slots=True)
class SweepConfig:
    """What is tried, on which data, and how it is trained in between."""

    data: str
    val: str = ""
    val_split: float = 0.0
    strategies: tuple[str, ...] = ("magnitude",)
    scopes: tuple[str, ...] = (Scope.AUTO,)
    patterns: tuple[str, ...] = ("unstructured",)
    params: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Parameters of strategies that have them, each with the values to try."""
    sparsities: tuple[float, ...] = ()
    schedules: tuple[str, ...] = ("constant",)
    epochs: int = 0
    batch_size: int = BATCH_SIZE
    samples: int = SAMPLES
    """Examples for strategies that look at data."""
    lr: float | None = None
    optimizer: str = ""
    loss: str = ""
    metric: str = ""
    policy: str = "default"
    only: str = ""
    exclude: tuple[str, ...] = ()
    seed: int = 0
    model: str = ""
    """What builds the model, for weights alone."""
    custom_objects: str = ""
    is_trusted: bool = False

    @property
    def as_json(self) -> dict[str, Any]:
        """The choices as they are noted."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> SweepConfig:
        """The choices that were noted."""
        fields: dict[str, Any] = {name: _frozen(value) for name, value in data.items()}
        return cls(**fields)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
