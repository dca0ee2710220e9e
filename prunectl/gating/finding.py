"""What came of a limit, and of all of them."""

from __future__ import annotations

from dataclasses import dataclass

from prunectl.errors import PrunectlError
from prunectl.gating.keys import Metric
from prunectl.measuring.gates import Gate

ERROR, WARNING = "error", "warning"


@dataclass(frozen=True, slots=True)
class Finding(Gate):
    """A limit, what was found, and where in the file of budgets it stands."""

    unit: Metric = Metric.COUNT
    budget: str = ""
    tensor: str = ""
    line: int = 1
    note: str = ""
    """What is behind the number, a full sentence."""
    message: str = ""
    """What who wrote the budget has to say."""

    @property
    def is_failure(self) -> bool:
        """Whether it says no."""
        return not self.ok and self.level == ERROR

    @property
    def is_warning(self) -> bool:
        """Whether it only warns."""
        return not self.ok and self.level != ERROR

    @property
    def verdict(self) -> str:
        """The outcome in a word."""
        return "pass" if self.ok else "FAIL" if self.is_failure else "warn"


@dataclass(frozen=True, slots=True)
class Unusable:
    """A model, or a limit on it, that nothing can be said about."""

    budget: str
    path: str
    line: int
    error: PrunectlError


@dataclass(frozen=True, slots=True)
class Findings:
    """All that was found: what every report is made of."""

    file: str
    """The file of budgets, as a reader of the report finds it."""
    findings: tuple[Finding, ...]
    unusable: tuple[Unusable, ...] = ()
    notes: tuple[str, ...] = ()
    models: int = 0
    """How many were measured."""

    @property
    def failed(self) -> tuple[Finding, ...]:
        """What said no."""
        return tuple(finding for finding in self.findings if finding.is_failure)

    @property
    def warned(self) -> tuple[Finding, ...]:
        """What only warns."""
        return tuple(finding for finding in self.findings if finding.is_warning)

    @property
    def exit_code(self) -> int:
        """The worst of what happened."""
        return max([0, *([1] if self.failed else []), *(one.error.exit_code for one in self.unusable)])
