"""`python -m prunectl`, the same as `prunectl`: the first lines that run, before anything is imported or written."""

import os
import signal
import sys

CANCELLED = 130


def main() -> int:
    """Run the command that the user typed, and return its exit code."""
    # Ctrl-C while Python still imports ends without a traceback. A handler that `nohup` or a parent has set stays.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(CANCELLED))
    from prunectl import cli  # noqa: PLC0415 - see above

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
