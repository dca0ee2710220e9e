"""The front door: from the words on the command line to an exit code.

Nothing heavy is imported here, so that `--version` is instant; and whatever is imported later is imported inside
`main`, because Python's own exit code for a crash is 1, which here means that a gate said no.
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
"""Options, or their beginnings, by which data goes through a model; a recipe may name data."""
_NEW_OBJECTS = 50_000
"""After so many new objects Python looks for garbage, until a framework is imported."""
FAILED, CANCELLED, BROKEN_PIPE, TERMINATED = 5, 130, 141, 143


class Terminated(BaseException):
    """SIGTERM arrived: unwind, so that nothing half-written stays."""


def main() -> int:
    """Run the command that the user typed, and return its exit code."""
    arguments = sys.argv[1:]
    is_heard = signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    try:
        if is_heard:
            signal.signal(signal.SIGINT, _interrupt)
        _open_what_is_closed()
        signal.signal(signal.SIGTERM, _terminate)
        # What reads models makes much that stays and little garbage: to look for it as often as usual costs a tenth.
        gc.set_threshold(_NEW_OBJECTS)
        if not _may_calibrate(arguments):
            # The pools that NumPy's libraries start at import serve nothing here, and cost start-up time.
            os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        # PyTorch takes a big tensor from the system anew each time: in pages of 2 MB, a tenth of a large cut is saved.
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
            # All is done that can be half done: what is left is Python's own clean-up.
            signal.signal(signal.SIGINT, _leave)
    return code


def _may_calibrate(arguments: list[str]) -> bool:
    """Whether data may go through a model, after which NumPy multiplies, inverts and factorises Gram matrices."""
    return arguments[:1] == ["sweep"] or (
        arguments[:1] in (["prune"], ["inspect"]) and any(argument.startswith(_WITH_DATA) for argument in arguments)
    )


def _open_what_is_closed() -> None:
    # A stream that the shell closed (`>&-`) is None in Python, and its file number goes to the next file opened.
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
    """Nothing can be written to where the output should go, not even an object that says so."""
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
