"""JSON from strangers: one sentence for whatever is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prunectl.errors import InputError


def parse_object(text: bytes | str, path: Path, what: str) -> dict[str, Any]:
    """Return the object that a JSON text holds."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise InputError(f"{path} is refused: {what} is nested too deep") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged: {what} is not JSON") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is damaged: {what} is not a JSON object")
    return value
