"""Numbers that stand in a Keras configuration between the layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SCALAR = (int, float, str, bool, type(None))
_MAX_NESTING = 12


def has_lists(said: Any, nesting: int = 0) -> bool:
    """Whether an argument of a call is a list of numbers, which may have one for each channel."""
    if nesting > _MAX_NESTING:
        return True
    if isinstance(said, Mapping):
        if said.get("class_name") == "__keras_tensor__":
            return False
        return any(has_lists(one, nesting + 1) for one in said.values())
    if isinstance(said, list):
        if _is_reference(said):
            return any(has_lists(one, nesting + 1) for one in said[3:])
        numbers = [one for one in said if isinstance(one, int | float) and not isinstance(one, bool)]
        return len(numbers) > 1 or any(has_lists(one, nesting + 1) for one in said)
    return not isinstance(said, _SCALAR)


def _is_reference(said: list[Any]) -> bool:
    """Whether a list names a layer, a call and an output; Keras 2 marks constants in the same way."""
    return 3 <= len(said) <= 4 and isinstance(said[0], str) and type(said[1]) is int and not isinstance(said[2], list)
