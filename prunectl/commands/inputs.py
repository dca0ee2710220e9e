"""The models that a command line names: each is tried, and one that fails does not stop the others."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from prunectl.errors import PrunectlError, UsageError, attempt
from prunectl.formats.scratch import temporary_folder
from prunectl.measuring.survey import Survey
from prunectl.reporting.report import Failure

STDIN = "-"


def survey_each(words: Iterable[str], look: Callable[[Path], Survey]) -> tuple[list[Survey], list[Failure]]:
    """Return what was found in each model, and what could not be used."""
    surveys, failures = [], []
    for word in words:
        with local(word) as path:
            found = attempt(look, path)
        if isinstance(found, PrunectlError):
            failures.append(Failure(word, _about_what_was_named(found, path, word)))
        else:
            surveys.append(replace(found, path=word))
    return surveys, failures


def _about_what_was_named(error: PrunectlError, path: Path, word: str) -> PrunectlError:
    """Return an error that speaks of standard input, not of the scratch file that its bytes were kept in."""
    if word == STDIN:
        error.message = error.message.replace(str(path), "standard input")
        error.hint = error.hint.replace(str(path), STDIN)
    return error


@contextmanager
def local(word: str) -> Generator[Path]:
    """Yield a path to what was named; standard input is kept in a scratch file meanwhile."""
    if word != STDIN:
        yield Path(word)
        return
    if sys.stdin.isatty():
        raise UsageError("- reads a model from standard input, which is a terminal", hint="prunectl inspect - < MODEL")
    with temporary_folder() as scratch:
        copy = scratch / "standard-input"
        with copy.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        try:
            yield copy
        except PrunectlError as error:
            raise _about_what_was_named(error, copy, word) from error
