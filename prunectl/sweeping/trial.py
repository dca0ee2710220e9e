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
    """Empty without training."""
    pattern: str = ""
    """Empty for unstructured pruning."""
    params: str = ""
    """Parameters of the strategy as NAME=VALUE, separated by commas."""

    def trial(self, sparsity: float) -> Trial:
        """The trial of this variant at a sparsity."""
        return Trial(self.strategy, self.scope, self.schedule, sparsity, self.pattern, self.params)


@dataclass(frozen=True, slots=True)
class Trial:
    """A variant at a sparsity."""

    strategy: str
    scope: str
    schedule: str
    """Empty without training."""
    sparsity: float
    pattern: str = ""
    params: str = ""

    @property
    def variant(self) -> Variant:
        """The variant, which is the trial without its sparsity."""
        return Variant(self.strategy, self.scope, self.schedule, self.pattern, self.params)

    @property
    def name(self) -> str:
        """Name of the trial and of its folder."""
        parts = (*self.variant, f"{100 * self.sparsity:.4g}")
        return "-".join(quote(part, safe=":=,") for part in parts if part) if self != BASELINE else "base"


BASELINE = Trial("", "", "", 0.0)
"""The trial of the unpruned model."""


@dataclass(frozen=True, slots=True)
class TrialResult:
    """Metric and sizes of the model of a trial."""

    metric: str
    value: float
    logs: dict[str, float]
    """The loss and every metric."""
    sparsity: float
    """Share of zeros among all parameters."""
    raw: int
    gzip: int
    path: str
    """Path of the model, relative to the folder of the sweep; empty for the baseline, and if training diverged."""
    notes: tuple[str, ...] = ()
    is_up: bool | None = None
    """Whether a higher metric is better; None means that the metric's name decides."""
    digest: str = ""
    """Hash of the model of the trial."""

    @property
    def is_number(self) -> bool:
        """Whether the metric is finite: a model that was pruned too far may return NaN."""
        return math.isfinite(self.value)

    @property
    def higher_is_better(self) -> bool:
        """Whether a higher metric is better."""
        return self.is_up if self.is_up is not None else resolve_direction(self.metric)

    @property
    def as_json(self) -> dict[str, Any]:
        """The result as it is recorded in the journal."""
        return {**asdict(self), "value": self.value if self.is_number else None}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TrialResult:
        """A result that was recorded in the journal."""
        value = math.nan if data["value"] is None else data["value"]
        return cls(**{**data, "value": value, "notes": tuple(data["notes"])})


def diverged(point: Trial, error: PrunectlError) -> TrialResult:
    """The result of a trial that diverged: no model, and nothing to evaluate."""
    return TrialResult("", math.nan, {}, 0.0, 0, 0, "", (f"{point.name}: {error.message}; {error.hint}.",))


@dataclass(frozen=True, slots=True)
class SweepConfig:
    """Options of a sweep: what to try, on which data, and how to train."""

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
    """Number of calibration examples, for strategies that need data."""
    lr: float | None = None
    optimizer: str = ""
    loss: str = ""
    metric: str = ""
    policy: str = "default"
    only: str = ""
    exclude: tuple[str, ...] = ()
    seed: int = 0
    model: str = ""
    """Function that builds the model, for files that hold only weights."""
    custom_objects: str = ""
    is_trusted: bool = False

    @property
    def as_json(self) -> dict[str, Any]:
        """The options as they are recorded in the journal."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> SweepConfig:
        """Options that were recorded in the journal."""
        fields: dict[str, Any] = {name: _as_tuples(value) for name, value in data.items()}
        return cls(**fields)


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value
