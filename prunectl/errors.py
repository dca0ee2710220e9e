"""The errors that a user can fix.

PrunectlError
├── UsageError         2   a flag, a name or a limit that makes no sense; an output that exists
├── InputError         3   the input is missing, unreadable, broken or not a model
│   └── UntrustedError 3   opening it would run code that came with it
├── MissingExtraError  4   an optional dependency is not installed
└── WorkError          5   the work failed, or its result was rejected; nothing was written
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, TypeVar

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
FILE_LIMIT = "raise the limit of the shell (ulimit -f unlimited), if it has one"
_ONLY_WRITING = NO_ROOM | {errno.EROFS}
SCRATCH = re.compile(r"\.?prunectl-[0-9a-f]{16}")
"""The names of scratch folders, see `formats.scratch`."""
MAX_NAME_CHARACTERS = 80
Subject = TypeVar("Subject")
Result = TypeVar("Result")


class PrunectlError(Exception):
    """An error that the user can fix, with a hint how."""

    exit_code: ClassVar[int] = 5
    kind: ClassVar[str] = "work"
    max_characters: ClassVar[int] = 2000

    def __init__(self, message: str, *, hint: str = "", did_you_mean: tuple[str, ...] = ()) -> None:
        # Messages quote names from files, and a name may be as long as the file.
        self.message = abbreviated(message, self.max_characters)
        super().__init__(self.message)
        self.hint = "\n".join(abbreviated(line, self.max_characters) for line in hint.split("\n"))
        self.did_you_mean = tuple(abbreviated(name) for name in did_you_mean)


class UsageError(PrunectlError):
    """The command line or a configuration asks for something that does not exist."""

    exit_code = 2
    kind = "usage"


class InputError(PrunectlError):
    """The input is missing, unreadable, broken or not a model."""

    exit_code = 3
    kind = "input"
    max_characters = 300


class UntrustedError(InputError):
    """Opening the input would run code that came with it."""

    kind = "untrusted"


class MissingExtraError(PrunectlError):
    """An optional dependency is not installed."""

    exit_code = 4
    kind = "missing-extra"


class WorkError(PrunectlError):
    """The work failed, or its result was rejected."""


def translate(error: Exception) -> PrunectlError | None:
    """The error to show for an error of the operating system; None for a bug of prunectl."""
    if isinstance(error, MemoryError):
        return WorkError("prunectl ran out of memory")
    if not isinstance(error, OSError):
        return None
    if isinstance(reason := getattr(error, "reason", None), OSError):
        # urllib wraps the error of the network.
        return translate(reason)
    if error.errno == errno.EFBIG:
        return WorkError("a file would be larger than allowed: File too large; nothing was written", hint=FILE_LIMIT)
    if error.errno in NO_ROOM:
        return WorkError(f"no space left on the disk{_where(error)}; nothing was written")
    if error.errno is not None and is_of_output(error):
        return WorkError(f"{error.filename or 'the output'} cannot be written: {error.strerror}; nothing was written")
    if error.errno is not None and error.filename:
        return InputError(f"{_text(error.filename)} cannot be opened: {error.strerror}")
    if error.errno == errno.ENOENT and _is_folder_gone():
        return WorkError("the current folder was removed; nothing was written", hint="change to one that exists: cd")
    if error.errno is not None or isinstance(error, TimeoutError):
        # Errors while reading an input are translated by `reading`: this one is of the network, a pipe or an output.
        return WorkError(
            f"the operating system reported an error: {error.strerror or first_line(error)}; nothing was written"
        )
    return None


def _is_folder_gone() -> bool:
    try:
        Path.cwd()
    except FileNotFoundError:
        return True
    return False


@contextmanager
def reading(path: Path) -> Generator[None]:
    """Turn an error of the operating system into one about an input: a broken disk, a file that was removed."""
    try:
        yield
    except OSError as error:
        if error.errno is None or is_of_output(error):
            raise
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


@contextmanager
def writing(path: Path) -> Generator[None]:
    """Turn an error of the operating system into one about an output."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise WorkError(f"{path} cannot be written: {error.strerror}") from error


def is_of_output(error: OSError) -> bool:
    """Whether an error of the operating system is known to be about an output."""
    if error.errno in _ONLY_WRITING:
        return True
    name = error.filename
    return isinstance(name, str | bytes) and any(map(SCRATCH.fullmatch, Path(os.fsdecode(name)).parts))


def abbreviated(text: str, most: int = MAX_NAME_CHARACTERS) -> str:
    """A text of at most `most` characters, the middle of a longer one left out. For names that come from a file."""
    if len(text) <= most:
        return text
    end = most // 3
    return f"{text[: most - end - 1]}…{text[len(text) - end :]}"


def some_tensors(names: Sequence[str]) -> str:
    """The number of tensors and the name of the first, as the subject of a sentence."""
    name = abbreviated(names[0])
    return f"1 tensor, {name}," if len(names) == 1 else f"{len(names)} tensors, such as {name},"


def first_line(error: Exception) -> str:
    """The first line of a library's error message."""
    return (str(error) or type(error).__name__).strip().partition("\n")[0]


def attempt(action: Callable[[Subject], Result], subject: Subject) -> Result | PrunectlError:
    """The result of an action, or the error that the user can fix."""
    try:
        return action(subject)
    except PrunectlError as error:
        return error
    except BrokenPipeError:
        raise
    except (OSError, MemoryError) as error:
        known = translate(error)
        if known is None:
            raise
        return known


def _where(error: OSError) -> str:
    return f" that holds {_text(error.filename)}" if error.filename else ""


def _text(name: object) -> str:
    return os.fsdecode(name) if isinstance(name, str | bytes) else str(name)
