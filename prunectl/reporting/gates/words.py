"""A finding in words."""

from __future__ import annotations

from prunectl.gating.finding import Finding, Findings
from prunectl.gating.keys import Metric
from prunectl.units import Units, count, nbytes, percent


def number(value: float, unit: Metric, units: Units = Units.SI) -> str:
    """Return what was found, or its limit, as people read it."""
    if unit is Metric.RATIO:
        return f"-{percent(-value)}" if value < 0 else percent(value)
    if unit is Metric.BYTES:
        return f"-{nbytes(-int(value), units)}" if value < 0 else nbytes(int(value), units)
    if unit is Metric.POINTS:
        return f"{100 * value:.3g} pp"
    if unit is Metric.NUMBER:
        return f"{value:.4g}"
    return count(int(value))


def subject(found: Finding) -> str:
    """Return what the limit is about."""
    return f"{found.model}: {found.tensor}" if found.tensor else found.model


def pair(found: Finding, units: Units = Units.SI) -> tuple[str, str]:
    """Return what was found and its limit, told apart even where rounding makes them one."""
    actual, limit = number(found.actual, found.unit, units), number(found.limit, found.unit, units)
    if actual == limit and found.actual != found.limit:
        if found.unit is Metric.BYTES:
            return f"{count(int(found.actual))} B", f"{count(int(found.limit))} B"
        if found.unit is Metric.POINTS:
            return f"{100 * found.actual:.7g} pp", f"{100 * found.limit:.7g} pp"
        if found.unit is Metric.NUMBER:
            return f"{found.actual:.9g}", f"{found.limit:.9g}"
        return f"{found.actual:.6%}", f"{found.limit:.6%}"
    return actual, limit


def sentence(found: Finding, units: Units = Units.SI) -> str:
    """Return a limit, what was found, and what there is to say of it."""
    actual, limit = pair(found, units)
    text = f"{found.id}: {subject(found)} has {actual}, the limit is {limit}."
    return " ".join(filter(None, (text, found.note, found.message)))


def summary(found: Findings) -> str:
    """Return all of it in a line."""
    passed = len(found.findings) - len(found.failed) - len(found.warned)
    parts = [
        f"{count(len(found.failed))} failed",
        f"{count(len(found.warned))} warned",
        f"{count(passed)} passed",
        *([f"{count(len(found.unusable))} could not be judged"] if found.unusable else []),
    ]
    return f"{', '.join(parts)}; {count(found.models)} {'model' if found.models == 1 else 'models'} measured"
