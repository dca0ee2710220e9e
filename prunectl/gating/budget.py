"""What some models must keep to, as a value."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from prunectl.gating.keys import Metric


class OnMissing(StrEnum):
    """What it means that a baseline does not know a model."""

    WARN = "warn"
    FAIL = "fail"
    CREATE = "create"


@dataclass(frozen=True, slots=True)
class Limit:
    """From where on it warns, from where on it says no."""

    name: str
    metric: Metric
    line: int
    fail: float | None
    warn: float | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """Something that is kept or not, with nothing to count towards."""

    value: str
    line: int


@dataclass(frozen=True, slots=True)
class Drop:
    """How much worse a model may be than another, judged on data by a framework."""

    limit: Limit
    data: str
    against: str
    metric: str = ""
    model: str = ""
    custom_objects: str = ""
    batch_size: int = 32


@dataclass(frozen=True, slots=True)
class LayerBudget:
    """Limits on the tensors that a selector matches."""

    selector: str
    line: int
    limits: tuple[Limit, ...]
    pattern: Wanted | None
    message: str


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits on the models that some globs match."""

    name: str
    line: int
    paths: tuple[str, ...]
    limits: tuple[Limit, ...]
    growth: tuple[Limit, ...]
    """In bytes or as a share, which the metric says; at most one of each."""
    pattern: Wanted | None
    keep_zeros: Wanted | None
    drop: Drop | None
    layers: tuple[LayerBudget, ...]
    message: str


@dataclass(frozen=True, slots=True)
class Budgets:
    """A file of budgets, understood."""

    path: Path
    baseline: str
    on_missing: OnMissing
    budgets: tuple[Budget, ...]

    @property
    def folder(self) -> Path:
        """Where its paths begin."""
        return self.path.parent
