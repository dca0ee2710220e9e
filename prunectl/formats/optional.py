"""Packages that not everybody has."""

from __future__ import annotations

import importlib
from typing import Any

from prunectl.errors import MissingExtraError


def require(module: str, *, extra: str) -> Any:
    """Return a module, or say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise  # the library is there, but broken: that is not ours to explain
        raise MissingExtraError(f"{module} is not installed", hint=f"pip install 'prunectl[{extra}]'") from error
