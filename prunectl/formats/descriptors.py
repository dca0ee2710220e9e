"""The descriptor of standard output, to which C code and child processes write as well."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from io import TextIOWrapper

_STDOUT = 1


def take_stdout() -> TextIOWrapper:
    """Send everything that is written to standard output to stderr, and return a stream to where it went before."""
    stream = sys.stdout
    stream.flush()
    taken = open(  # noqa: SIM115 - the caller closes it
        os.dup(stream.fileno()),
        "w",
        buffering=1 if stream.isatty() else -1,
        encoding=stream.encoding,
        errors=stream.errors,
    )
    os.dup2(sys.stderr.fileno(), stream.fileno())
    return taken


@contextmanager
def stdout_taken() -> Generator[TextIOWrapper | None]:
    """As `take_stdout`, until the context ends; None if `sys.stdout` is not standard output, as in tests."""
    if not _is_stdout_real():
        yield None
        return
    taken = take_stdout()
    try:
        yield taken
    finally:
        _flush_c_streams()
        os.dup2(taken.fileno(), _STDOUT)
        taken.close()


def _is_stdout_real() -> bool:
    try:
        return sys.stdout.fileno() == _STDOUT and sys.stderr.fileno() >= 0
    except (AttributeError, OSError, ValueError):
        return False


def _flush_c_streams() -> None:
    # What C code printed may wait in a buffer until the process ends. NumPy, with which such code comes, loads ctypes.
    ctypes = sys.modules.get("ctypes")
    if ctypes is not None and os.name == "posix":
        ctypes.CDLL(None).fflush(None)
