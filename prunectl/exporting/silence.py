"""Quiet for what is written in C++, which knows no sys.stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def silence() -> Iterator[None]:
    """Let nothing through to the files of standard output and error, whoever writes."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    kept = {number: os.dup(number) for number in (1, 2)}
    _flush()
    try:
        for number in kept:
            os.dup2(nothing, number)
        yield
    finally:
        _flush()
        for number, old in kept.items():
            os.dup2(old, number)
            os.close(old)
        os.close(nothing)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
