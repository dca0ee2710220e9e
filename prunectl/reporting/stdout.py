"""Standard output of a command: its data, and nothing that code of a model prints."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager, redirect_stdout
from typing import TextIO

from prunectl.formats.descriptors import stdout_taken

_reserved: list[TextIO] = []


def data_stream() -> TextIO:
    """Where a command writes its data."""
    return _reserved[-1] if _reserved else sys.stdout


@contextmanager
def reserved() -> Generator[None]:
    """Send what is printed to stderr: a line of somebody's builder or strategy would break JSON, rows or a model."""
    with stdout_taken() as taken:
        _reserved.append(taken or sys.stdout)
        try:
            with redirect_stdout(sys.stderr):
                yield
        finally:
            _reserved.pop()
