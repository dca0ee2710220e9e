"""The user's code that builds a model for weights alone, as `--model` names it."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

from prunectl.errors import PrunectlError, UsageError, first_line
from prunectl.plugins import find

_TOLD = 3


def builder(reference: str) -> Any:
    """Return what a reference names, and refuse a file of which it is not said what in it is meant."""
    if reference.endswith(".py") and ":" not in reference:
        names = _public(Path(reference))
        told = ", ".join(names[:_TOLD]) or "nothing that could be called"
        raise UsageError(
            f"{reference} has {told}: which of them builds the model?",
            did_you_mean=tuple(f"{reference}:{name}" for name in names[:_TOLD]),
            hint=f"--model {reference}:{names[0] if names else 'function'}",
        )
    return find("model", reference, {})


def built(make: Any, reference: str) -> Any:
    """Return what a builder makes; its mistakes are the user's to mend."""
    if not callable(make):
        raise UsageError(f"--model {reference} is a {type(make).__name__}, not a function")
    try:
        inspect.signature(make).bind()
    except TypeError as error:
        raise UsageError(
            f"--model {reference} cannot be called without arguments: {error}",
            hint="name a function without arguments that returns the model",
        ) from error
    except ValueError:
        pass  # Python cannot say what some callables take
    try:
        return make()
    except PrunectlError:
        raise
    except Exception as error:
        raise UsageError(
            f"--model {reference} raises {type(error).__name__}: {first_line(error)}",
            hint="--debug shows where",
        ) from error


def _public(path: Path) -> list[str]:
    """Return the functions and classes of a file, which is not run."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError) as error:
        raise UsageError(f"{path} is not a Python file: {first_line(error)}") from error
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
