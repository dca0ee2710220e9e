"""A pickle program, followed without importing or calling anything.

Every opcode is a step of bounded cost; what the program would have called becomes a value that says so.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunectl.errors import InputError
from prunectl.formats.torch.machine import Machine
from prunectl.formats.torch.opcodes import Reader
from prunectl.formats.torch.steps import STEPS

MAX_STEPS = 2_000_000
"""More than any model needs: ten thousand tensors take half a million."""
STOP = ord(".")


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """What a pickle would make."""

    value: Any
    end: int
    """Where the bytes after the program begin."""
    storages: tuple[Any, ...]
    """The ids of all that the container has to provide."""
    strangers: tuple[str, ...]
    """What loading would call, make or import beyond plain data, each as a phrase."""


def follow(data: bytes | mmap.mmap, path: Path, what: str, *, start: int = 0, end: int | None = None) -> Program:
    """Follow the pickle program that begins at a byte of some data."""
    machine = Machine(Reader(data, start, len(data) if end is None else end))
    try:
        value = _run(machine)
    except (ValueError, IndexError, KeyError, TypeError) as error:
        reason = f": {error}" if isinstance(error, ValueError) else ""
        raise InputError(
            f"{path} is truncated or damaged: {what} is not a pickle that can be followed{reason[:80]}"
        ) from error
    except _TooMuchError as error:
        raise InputError(f"{path} is refused: {what} is a pickle of more than {MAX_STEPS} steps") from error
    return Program(value, machine.reader.at, tuple(machine.storages), machine.strangers())


class _TooMuchError(Exception):
    """The program is too long to be a model's."""


def _run(machine: Machine) -> Any:
    reader, data = machine.reader, machine.reader.data
    for _ in range(MAX_STEPS):
        if reader.at >= reader.end:
            raise ValueError("it ends early")
        code = data[reader.at]
        reader.at += 1
        if code == STOP:
            return machine.stack.pop()
        STEPS[code](machine, code)
    raise _TooMuchError
