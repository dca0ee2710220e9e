"""The entry point: from the command line to an exit code.

Nothing heavy is imported at the top, so that `--version` is instant. Everything else is imported inside `main`:
an import that fails outside of it would exit with Python's own code 1, which in prunectl means that a check failed.
"""

from __future__ import annotations

import gc
import os
import signal
import sys

from prunectl import __version__

TYPE_CHECKING = False
"""As in `prunectl/__init__.py`."""

if TYPE_CHECKING:
    from types import FrameType
    from typing import TextIO

_WITH_DATA = ("--data", "--recipe", "--repair", "--sensitivity")
"""Prefixes of options with which data may run through the model; a recipe may name data as well."""
_NEW_OBJECTS = 50_000
"""The threshold of the garbage collector, in new objects, until a framework is imported."""
FAILED, CANCELLED, BROKEN_PIPE, TERMINATED = 5, 130, 141, 143


class Terminated(BaseException):
    """SIGTERM arrived: unwind the stack, so that no half-written file stays."""


def main() -> int:
    """Run the command that the user typed, and return its exit code."""
    arguments = sys.argv[1:]
    is_heard = signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    try:
        if is_heard:
            signal.signal(signal.SIGINT, _interrupt)
        _open_what_is_closed()
        signal.signal(signal.SIGTERM, _terminate)
        # Reading a model allocates many objects that live on and little garbage: the default threshold costs a tenth.
        gc.set_threshold(_NEW_OBJECTS)
        if not _may_calibrate(arguments):
            # This command multiplies no matrices, and starting the thread pool of OpenBLAS takes time.
            os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        # PyTorch allocates each large tensor from the system. Pages of 2 MB save a tenth of the time of a large cut.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        code = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        return _hang_up()
    except KeyboardInterrupt:
        return CANCELLED
    except Terminated:
        return TERMINATED
    except OSError as error:
        return _give_up(error)
    finally:
        if is_heard:
            # All files are written. Ctrl-C during Python's own clean-up must not give a traceback.
            signal.signal(signal.SIGINT, _leave)
    return code


def _may_calibrate(arguments: list[str]) -> bool:
    """Whether data may run through a model, so that NumPy multiplies, inverts and factorises Gram matrices."""
    return arguments[:1] == ["sweep"] or (
        arguments[:1] in (["prune"], ["inspect"]) and any(argument.startswith(_WITH_DATA) for argument in arguments)
    )


def _open_what_is_closed() -> None:
    # A stream that the shell closed (`>&-`) is None in Python, and the next file opened would get its descriptor.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - open as long as the process


def _run(arguments: list[str]) -> int:
    if arguments in (["-V"], ["--version"]):
        sys.stdout.write(f"prunectl {__version__}\n")
        return 0
    try:
        from prunectl.commands.app import run  # noqa: PLC0415 - an import that fails is caught here as well

        return run(arguments)
    except (BrokenPipeError, KeyboardInterrupt, Terminated):
        raise
    except Exception as error:  # noqa: BLE001 - the one place where errors are caught
        if _interrupts:
            # A framework whose import is interrupted fails with an error of its own.
            return CANCELLED
        return _explain(error, arguments)


def _explain(error: Exception, arguments: list[str]) -> int:
    from prunectl.reporting.reporter import report_error  # noqa: PLC0415 - see _run

    return report_error(error, arguments)


_interrupts: list[int] = []


def _interrupt(number: int, _frame: FrameType | None) -> None:
    _interrupts.append(number)
    raise KeyboardInterrupt


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    raise Terminated


def _leave(_signal: int, _frame: FrameType | None) -> None:
    os._exit(CANCELLED)


def _hang_up() -> int:
    _silence(sys.stdout)
    return BROKEN_PIPE


def _give_up(error: OSError) -> int:
    """Standard output cannot be written to, so not even the JSON object of an error can be printed."""
    _silence(sys.stdout)
    try:
        sys.stderr.write(f"error: standard output cannot be written: {error.strerror}\n")
        sys.stderr.flush()
    except OSError:
        _silence(sys.stderr)
    return FAILED


def _silence(stream: TextIO) -> None:
    # Python flushes the streams once more on its way out, which must not fail again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
