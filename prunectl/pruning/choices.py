"""The strategies, schedules, policies and formats that an option can name, built in and installed."""

from __future__ import annotations

from dataclasses import dataclass

from prunectl.formats.registry import FORMATS
from prunectl.plugins import installed
from prunectl.pruning.plan import MIN_SIZE, POLICIES
from prunectl.pruning.schedules import CURVES, line_of
from prunectl.pruning.strategies import STRATEGIES

_KINDS = {"strategies": "strategy", "schedules": "schedule", "policies": "policy", "formats": "format"}


@dataclass(frozen=True, slots=True)
class Choice:
    """A name that an option can take, where it comes from, and a summary."""

    kind: str
    name: str
    source: str
    summary: str


def choices(kind: str = "") -> tuple[Choice, ...]:
    """All names of a kind, or of all kinds."""
    listed = [
        *(Choice("strategies", strategy.name, "built in", strategy.summary) for strategy in STRATEGIES),
        *(Choice("schedules", name, "built in", line_of(curve)) for name, curve in CURVES.items()),
        *(Choice("policies", policy.name, "built in", policy.summary) for policy in POLICIES),
        Choice("policies", f"{MIN_SIZE}N", "built in", "kernels of at least N weights"),
    ]
    for row in FORMATS:
        summary = f"{row.title} {' '.join(filter(None, row.suffixes))}".strip()
        listed.append(Choice("formats", row.name, "built in", summary))
    for plural, singular in _KINDS.items():
        listed += [Choice(plural, name, package, "") for name, package in installed(singular).items()]
    return tuple(choice for choice in listed if not kind or choice.kind == kind)
