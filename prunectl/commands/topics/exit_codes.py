"""What the exit code of a command says."""

from __future__ import annotations

from prunectl.commands.topics.table import aligned
from prunectl.errors import InputError, MissingExtraError, UsageError, WorkError
from prunectl.reporting.failure import BUG, CANCELLED

MEANINGS: dict[int, str] = {
    0: "done; every gate passed",
    1: "a gate said no, and nothing else: check, size, diff, verify",
    UsageError.exit_code: "usage: a flag, a name or a limit that makes no sense; an output exists",
    InputError.exit_code: "the input is missing, damaged, not a model, or needs --trust",
    MissingExtraError.exit_code: "an optional package is missing; the line that installs it is printed",
    WorkError.exit_code: "the work failed, or its result was rejected: nothing was written",
    BUG: "a bug in prunectl; --debug shows the traceback",
    CANCELLED: "Ctrl-C",
    141: "whoever read the output has closed it",
    143: "SIGTERM",
}


def text() -> str:
    """Return the text."""
    return f"""
Exit codes

{aligned((str(code), line) for code, line in MEANINGS.items())}

Only a gate gives 1, so that a build can tell "too big" from "broken":

  prunectl size model.h5 --max-gzip 5MB
  case $? in 0) ship ;; 1) echo "too big" ;; *) echo "broken" ;; esac

Of several inputs each is tried, and the worst code wins. Whatever the code,
an output is there whole or not at all.
"""
