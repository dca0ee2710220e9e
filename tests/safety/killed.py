"""A command that is killed when it opens a file whose path has a part in it: `killed PART COMMAND…`."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from typing import Any

from prunectl import cli


def main(part: str, *words: str) -> int:
    """Run the command, as far as it gets."""

    def hook(event: str, given: tuple[Any, ...]) -> None:
        if event == "open" and part in str(given[0]):
            os.kill(os.getpid(), signal.SIGKILL)

    # What the process was forked from may have looked already.
    tempfile.tempdir = None
    sys.addaudithook(hook)
    return cli._run(list(words))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
