"""A Keras configuration that calculates in floats long enough, whatever the model does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prunectl.formats.keras.config import part, text

_LOW = frozenset({"float16", "bfloat16", "mixed_float16", "mixed_bfloat16"})
_LOWER = {"float32": _LOW, "float64": _LOW | {"float32"}}


def calculating_in(precision: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the configuration with every lower precision raised to float32, or to float64."""
    return {str(key): _changed(value, str(key), precision) for key, value in config.items()}


def _changed(value: Any, key: str, precision: str) -> Any:
    if key == "dtype" and (value if isinstance(value, str) else _policy(value)) in _LOWER[precision]:
        return precision
    if isinstance(value, Mapping):
        return calculating_in(precision, value)
    if isinstance(value, list):
        return [_changed(one, "", precision) for one in value]
    return value


def _policy(value: Any) -> str:
    return text(part(value, "config"), "name")
