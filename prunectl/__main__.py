"""`python -m prunectl`, the same as `prunectl`: the first lines that run, before anything can be half done."""

import os
import signal
import sys

CANCELLED = 130


def main() -> int:
    """Run the command that the user typed, and return its exit code."""
    # Whoever has second thoughts while Python still imports gets no traceback; `nohup` and the like stay as they are.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(CANCELLED))
    from prunectl import cli  # noqa: PLC0415 - see above

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
