"""Prune saved neural networks on disk."""

from __future__ import annotations

import importlib

TYPE_CHECKING = False
"""`typing.TYPE_CHECKING` without importing typing, which is slow: Ctrl-C during that import would give a traceback."""

if TYPE_CHECKING:
    from typing import Any

    from prunectl.api import bench as bench
    from prunectl.api import check as check
    from prunectl.api import diff as diff
    from prunectl.api import doctor as doctor
    from prunectl.api import eval as eval  # noqa: A004 - as the command is called
    from prunectl.api import evaluate as evaluate
    from prunectl.api import export as export
    from prunectl.api import finetune as finetune
    from prunectl.api import init as init
    from prunectl.api import inspect as inspect
    from prunectl.api import prune as prune
    from prunectl.api import size as size
    from prunectl.api import strip as strip
    from prunectl.api import sweep as sweep
    from prunectl.api import verify as verify

__version__ = "0.2.0"
_FUNCTIONS = frozenset(
    "bench check diff doctor eval evaluate export finetune init inspect prune size strip sweep verify".split()  # noqa: SIM905
)


def __getattr__(name: str) -> Any:
    """The function of a command. The API is imported only when one of them is used."""
    if name not in _FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # By name: import-linter would read `from prunectl import __version__` in a lower layer as an import of the API.
    return getattr(importlib.import_module("prunectl.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_FUNCTIONS})
