"""A Keras configuration that calculates in 32-bit floats, whatever the model does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prunectl.formats.keras.config import part, text

_LOW = frozenset({"float16", "bfloat16", "mixed_float16", "mixed_bfloat16"})
_WHOLE = "float32"


def in_float32(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the configuration with every lower precision raised."""
    return {str(key): _raised(value, str(key)) for key, value in config.items()}


def _raised(value: Any, key: str) -> Any:
    if key == "dtype" and (value in _LOW if isinstance(value, str) else _policy(value) in _LOW):
        return _WHOLE
    if isinstance(value, Mapping):
        return in_float32(value)
    if isinstance(value, list):
        return [_raised(one, "") for one in value]
    return value


def _policy(value: Any) -> str:
    return text(part(value, "config"), "name")
