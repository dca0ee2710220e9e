"""The shells that ask for words, and how each is answered."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from difflib import get_close_matches
from typing import Any

from prunectl.commands.completion_bash import Asked
from prunectl.errors import UsageError

SHELLS = ("bash", "zsh", "fish", "powershell", "pwsh")
_ASKING = "complete_bash"
KNOWN = tuple(f"{what}_{shell}" for shell in SHELLS for what in ("complete", "source"))


def answer(command: Any, variable: str) -> int:
    """Answer what the script of a shell asks through a variable, and return the exit code."""
    asking = os.environ[variable]
    if asking not in KNOWN:
        raise UsageError(
            f"{variable} is {asking!r}, which no shell asks",
            did_you_mean=tuple(get_close_matches(asking, KNOWN)),
            hint="prunectl --show-completion prints what a shell needs",
        )
    return _answer_bash(command) if asking == _ASKING else _exit_code(command)


def _answer_bash(command: Any) -> int:
    asked = Asked.of(os.environ["COMP_WORDS"], int(os.environ["COMP_CWORD"]))
    os.environ |= {"COMP_WORDS": asked.line, "COMP_CWORD": str(asked.cursor)}
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = _exit_code(command)
    sys.stdout.writelines(f"{asked.rest(line)}\n" for line in said.getvalue().splitlines())
    return code


def _exit_code(command: Any) -> int:
    try:
        command.main([], prog_name="prunectl")
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0
