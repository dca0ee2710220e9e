"""What to say when a command fails as a whole."""

from __future__ import annotations

import sys
import traceback
from itertools import pairwise

from typer import Abort, TyperException

from prunectl.errors import PrunectlError, UsageError, translate
from prunectl.reporting import envelope
from prunectl.reporting.reporter import complain

CANCELLED, BUG = 130, 70


class _BugError(PrunectlError):
    """Prunectl itself is at fault."""

    exit_code = BUG
    kind = "bug"


def explain(error: Exception, words: list[str]) -> int:
    """Tell the user, or the script, what went wrong, and return the exit code."""
    if isinstance(error, Abort):
        return CANCELLED
    ours = _as_ours(error)
    if "--debug" in words:
        traceback.print_exception(error)
    if wants_json(words):
        command = next((word for word in words if not word.startswith("-")), "")
        sys.stdout.write(envelope.of_failure(ours, command))
        sys.stdout.flush()
    else:
        complain(ours)
    return ours.exit_code


def wants_json(words: list[str]) -> bool:
    """Whether the command line asks for JSON, even if the rest of it cannot be understood."""
    return not {"--json", "--format=json"}.isdisjoint(words) or ("--format", "json") in pairwise(words)


def _as_ours(error: Exception) -> PrunectlError:
    if isinstance(error, PrunectlError):
        return error
    if isinstance(error, TyperException):
        return UsageError(_sentence(error.format_message()), hint=_help_hint(error))
    known = translate(error)
    if known is not None:
        return known
    return _BugError(
        f"this is a bug in prunectl: {type(error).__name__}: {error}",
        hint="please report it, with the traceback that --debug shows",
    )


def _sentence(message: str) -> str:
    return " ".join(message.split()).rstrip(".")


def _help_hint(error: TyperException) -> str:
    """Return what explains the command that was understood so far: after a slip in its name, all of them."""
    context = getattr(error, "ctx", None)
    return f"see: {context.command_path if context is not None else 'prunectl'} --help"
