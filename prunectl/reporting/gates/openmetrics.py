"""Findings as OpenMetrics, for a dashboard that shows how close to their limits models are."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prunectl.gating.finding import Finding, Findings

_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})
_FAMILIES: tuple[tuple[str, str, Callable[[Finding], float]], ...] = (
    ("prunectl_gate_ok", "1 where the limit is kept.", lambda one: int(one.ok)),
    ("prunectl_gate_actual", "What was found.", lambda one: one.actual),
    ("prunectl_gate_limit", "The limit.", lambda one: one.limit),
)


def openmetrics(found: Findings) -> str:
    """Return a gauge for the verdicts, what was found, and the limits; and the exit code."""
    # A set of labels may come once: of several limits alike on one thing, the one that says no is told.
    ordered = sorted(found.findings, key=lambda one: (one.ok, one.is_warning))
    unique: dict[str, Finding] = {}
    for one in ordered:
        unique.setdefault(_labels(one), one)
    return "".join(f"{line}\n" for line in _lines(found, unique))


def _lines(found: Findings, unique: dict[str, Finding]) -> Iterator[str]:
    for name, line, number in _FAMILIES:
        yield f"# TYPE {name} gauge"
        yield f"# HELP {name} {line}"
        for labels, one in unique.items():
            yield f"{name}{{{labels}}} {number(one)!r}"
    for name, line, value in (
        ("prunectl_check_unusable", "What nothing could be said about.", len(found.unusable)),
        ("prunectl_check_exit_code", "As the command ended.", found.exit_code),
    ):
        yield f"# TYPE {name} gauge"
        yield f"# HELP {name} {line}"
        yield f"{name} {value}"
    yield "# EOF"


def _labels(one: Finding) -> str:
    said = {"budget": one.budget, "gate": one.id, "model": one.model, "tensor": one.tensor, "unit": str(one.unit)}
    return ",".join(f'{name}="{_safe(value)}"' for name, value in said.items())


def _safe(text: str) -> str:
    # A name of a file may hold bytes that are no text.
    return text.encode("utf-8", "replace").decode().translate(_ESCAPES)
