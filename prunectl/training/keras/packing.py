"""Arrays in the structure that a model takes them in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prunectl.training.data.source import Arrays, each


def inputs(model: Any, x: Arrays) -> Any:
    """Return inputs as the model takes them."""
    return _like(_names(model, "inputs"), each(x))


def targets(model: Any, y: Arrays | None) -> Any:
    """Return targets as the model puts out its answers."""
    return _like(_names(model, "outputs"), each(y)) if y is not None else None


def for_outputs(model: Any, parts: Sequence[Any]) -> Any:
    """Return one thing for each output, as the model puts them out."""
    return _like(_names(model, "outputs"), parts)


def _names(model: Any, which: str) -> tuple[str, ...]:
    """Return what a model calls its inputs or outputs, if it takes them by name."""
    for attribute in (f"_{which}_struct", f"_nested_{which}"):
        found = getattr(model, attribute, None)
        if isinstance(found, dict):
            return tuple(found)
    return ()


def _like(names: tuple[str, ...], parts: Sequence[Any]) -> Any:
    if names and len(names) == len(parts):
        return dict(zip(names, parts, strict=True))
    return parts[0] if len(parts) == 1 else list(parts)
