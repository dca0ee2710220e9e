"""Reads what a budget says of quality: by how much, on which data, against which model."""

from __future__ import annotations

from typing import Any

from prunectl.errors import UsageError
from prunectl.gating.budget import Drop, Limit
from prunectl.gating.keys import LEVELS, Metric
from prunectl.training.judging.drop import MaxDrop, max_drop

NAME = "max-drop"
EXAMPLE = '{fail = "0.5pp", data = "test.npz", against = "dense.h5"}'


def drop_of(table: dict[str, Any], line: int, batch_size: int | None) -> Drop:
    """Return what a table with known keys asks for."""
    levels = {level: _level(table[level]) for level in LEVELS if level in table}
    if not levels:
        raise UsageError("a drop has a level", hint=f"write {NAME} = {EXAMPLE}")
    if len({one.is_points for one in levels.values()}) > 1:
        raise UsageError("fail and warn are in different units", hint="write both in pp, or both as numbers")
    if len(levels) == len(LEVELS) and levels["warn"].amount > levels["fail"].amount:
        raise UsageError("it would fail before it warns")
    if batch_size is not None and batch_size < 1:
        raise UsageError("batch-size is at least 1")
    metric = Metric.POINTS if all(one.is_points for one in levels.values()) else Metric.NUMBER
    bounds = {level: levels[level].amount if level in levels else None for level in LEVELS}
    texts = {
        name.replace("-", "_"): table.get(name, "") for name in ("data", "against", "metric", "model", "custom-objects")
    }
    return Drop(Limit(NAME, metric, line, **bounds), batch_size=batch_size or 32, **texts)


def _level(value: Any) -> MaxDrop:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise UsageError(f"{value!r} is no drop", hint='write "0.5pp" (percentage points), or 0.01 of a loss')
    return max_drop(str(value))
