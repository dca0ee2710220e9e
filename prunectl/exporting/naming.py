"""What goes wrong with a copy, told of the file that the user knows."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from prunectl.errors import PrunectlError


@contextmanager
def naming(path: Path, copy: Path) -> Generator[None]:
    """Let errors name a path in place of that of its copy."""
    try:
        yield
    except PrunectlError as error:
        error.message = error.message.replace(str(copy), str(path))
        error.hint = error.hint.replace(str(copy), str(path))
        error.args = (error.message,)
        raise
