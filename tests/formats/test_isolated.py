"""What a forked child may do to its parent, and how long it may take."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from prunectl.errors import InputError
from prunectl.formats.isolated import in_child

MEGABYTES = 200 << 20


def child(work: Callable[[], bytes], seconds: float = 5.0) -> bytes:
    return in_child(work, Path("m.h5"), seconds=seconds, extra_bytes=MEGABYTES)


def test_it_answers_with_any_number_of_bytes() -> None:
    answer = bytes(range(256)) * 2000
    assert child(lambda: answer) == answer


def test_one_that_is_kept_busy_is_stopped() -> None:
    def spin() -> bytes:
        return b"".join(b"" for _ in count())

    with pytest.raises(InputError, match="takes too long to read"):
        child(spin, 0.1)


def test_one_that_has_to_wait_for_others_is_given_time() -> None:
    def wait() -> bytes:
        time.sleep(0.5)
        return b"at last"

    assert child(wait, 0.1) == b"at last"


def test_one_that_never_does_anything_is_stopped() -> None:
    with pytest.raises(InputError, match="takes too long to read"):
        child(lambda: bytes(signal.pause() or 0), 0.02)


def test_one_that_dies_is_the_fault_of_the_file() -> None:
    def die() -> bytes:
        os.kill(os.getpid(), signal.SIGSEGV)
        return b""

    with pytest.raises(InputError, match="crashes the library that reads it"):
        child(die)


def test_one_that_asks_for_too_much_memory_is_refused() -> None:
    with pytest.raises(InputError, match="more memory"):
        child(lambda: bytes(MEGABYTES * 2))
