"""The front door: from the words on the command line to an exit code.

Nothing heavy is imported here, so that `--version` is instant; and whatever is imported later is imported inside
`main`, because Python's own exit code for a crash is 1, which here means that a gate said no.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from prunectl import __version__

CANCELLED, BUG, BROKEN_PIPE, TERMINATED = 130, 70, 141, 143


class Terminated(BaseException):
    """SIGTERM arrived: unwind, so that nothing half-written stays."""


def main() -> int:
    """Run the command that the user typed, and return its exit code."""
    words = sys.argv[1:]
    if words in (["-V"], ["--version"]):
        sys.stdout.write(f"prunectl {__version__}\n")
        return 0
    signal.signal(signal.SIGTERM, _terminate)
    # The pools that NumPy's libraries start at import serve nothing here, and cost start-up time.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        code = _run(words)
        sys.stdout.flush()
    except BrokenPipeError:
        return _hang_up()
    except KeyboardInterrupt:
        return CANCELLED
    except Terminated:
        return TERMINATED
    return code


def _run(words: list[str]) -> int:
    try:
        from prunectl.commands.app import run  # noqa: PLC0415 - an import that fails is caught here as well

        return run(words)
    except (BrokenPipeError, KeyboardInterrupt, Terminated):
        raise
    except Exception as error:  # noqa: BLE001 - the one place where errors are caught
        return _explain(error, words)


def _explain(error: Exception, words: list[str]) -> int:
    from prunectl.reporting.failure import explain  # noqa: PLC0415 - see _run

    return explain(error, words)


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    raise Terminated


def _hang_up() -> int:
    # Python flushes stdout once more on its way out, which must not fail again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return BROKEN_PIPE
