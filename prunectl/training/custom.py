"""What the names of custom layers and functions mean, as the user says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prunectl.errors import UsageError
from prunectl.plugins import attribute
from prunectl.training.network import Origin


def objects(origin: Origin) -> dict[str, Any]:
    """Return the custom objects by name."""
    if not origin.custom_objects:
        return {}
    found = named(origin.custom_objects, "--custom-objects", "models:CUSTOM_OBJECTS")
    if not isinstance(found, Mapping):
        raise UsageError(f"{origin.custom_objects} is no dictionary of custom objects")
    return dict(found)


def named(reference: str, option: str, example: str) -> Any:
    """Return what `mod:name` or `./file.py:name` means."""
    where, colon, name = reference.rpartition(":")
    if not colon or not where or not name:
        raise UsageError(f"{option} {reference} names no thing in a module", hint=f"write {option} {example}")
    return attribute(where, name)


def function(reference: str, option: str) -> Any:
    """Return what can be called under a reference."""
    found = named(reference, option, "my_module:my_function")
    if not callable(found):
        raise UsageError(f"{option} {reference} is a {type(found).__name__}, not a function")
    return found
