"""What a command found, as a value: every layout is drawn from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prunectl.errors import PrunectlError
from prunectl.measuring.gates import Gate
from prunectl.measuring.shading import Shading
from prunectl.reporting.table import Table


@dataclass(frozen=True, slots=True)
class Failure:
    """One input of several that could not be used."""

    path: str
    error: PrunectlError


@dataclass(frozen=True, slots=True)
class Artifact:
    """A file or folder that was written."""

    path: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Section:
    """The part of a report that is about one model: facts, then tables, then remarks."""

    title: str
    facts: tuple[tuple[str, str], ...] = ()
    tables: tuple[Table, ...] = ()
    remarks: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()
    """A drawing, line by line."""


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of a command."""

    models: tuple[dict[str, Any], ...]
    """What `--json` says of each model."""
    main: Table
    """The rows that pipes, CSV and Markdown get."""
    sections: tuple[Section, ...] = ()
    """What people get; the main table alone when there is none."""
    gates: tuple[Gate, ...] = ()
    failures: tuple[Failure, ...] = ()
    artifacts: tuple[Artifact, ...] = ()
    remarks: tuple[str, ...] = ()
    bare: tuple[str, ...] | None = None
    """What `--quiet` prints instead of everything else."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """What `--json` says beside the models."""
    masks: Mapping[str, tuple[Shading, ...]] = field(default_factory=dict)
    """Where the zeros of each model are, by its path: what a page shows."""

    @property
    def exit_code(self) -> int:
        """The worst of what happened."""
        codes = [failure.error.exit_code for failure in self.failures]
        return max([*codes, 0 if all(gate.ok for gate in self.gates) else 1])
