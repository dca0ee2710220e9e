"""Work in a forked child, for libraries that a crafted file can crash or keep busy for ever."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from prunectl.errors import InputError
from prunectl.formats import isolated_child
from prunectl.formats.isolated_kept import Kept

_OUT_OF_TIME = "takes too long to read: it is damaged, or made to keep its reader busy"
_PIECE_BYTES = 1 << 16
_PATIENCE = 20
"""How much longer than it may reckon a child may take on a machine that is busy with other things."""
_OVER_TIME = frozenset({signal.SIGPROF, signal.SIGXCPU})
_kept: list[Kept] = []
"""The child that is kept, if any is."""


def in_child(work: Callable[[], bytes], path: Path, *, seconds: float, extra_bytes: int) -> bytes:
    """Return what ``work`` returns in a child of its own; whatever kills the child is the file's fault.

    The seconds are of processor time, so that a busy machine is not taken for a hostile file. The answer is bytes that
    the caller must parse with care: a child that a file has taken over may say anything.
    """
    found = _kept[-1].ask(work, seconds, extra_bytes, _PATIENCE * seconds) if _kept else None
    answer, status = _in_a_new_one(work, seconds, extra_bytes) if found is None else found
    if answer is None:
        raise InputError(f"{path} {_OUT_OF_TIME}")
    how, said = answer[:1], answer[1:]
    if how == isolated_child.DONE:
        return said
    if how == isolated_child.REFUSED:
        raise InputError(said.decode("utf-8", "backslashreplace"))
    if how == isolated_child.OUT_OF_ROOM:
        raise OSError(int(said), os.strerror(int(said)))
    if how == isolated_child.FAILED:
        raise InputError(f"{path} is truncated or damaged: {said.decode('utf-8', 'backslashreplace')}")
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in _OVER_TIME:
        raise InputError(f"{path} {_OUT_OF_TIME}")
    raise InputError(f"{path} crashes the library that reads it: it is damaged or hostile")


@contextmanager
def one_child() -> Generator[None]:
    """Keep one child for many files meanwhile; after one that kills it, a new one goes on with the next."""
    kept = Kept()
    _kept.append(kept)
    try:
        yield
    finally:
        _kept.remove(kept)
        kept.close()


def _in_a_new_one(work: Callable[[], bytes], seconds: float, extra_bytes: int) -> tuple[bytes | None, int]:
    """Return what a child of its own says, or nothing where time is up, and how it ended."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _be_child(work, writer, seconds, extra_bytes)
    os.close(writer)
    try:
        answer = _listen(reader, time.monotonic() + _PATIENCE * seconds)
    finally:
        os.close(reader)
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
    return answer, status


def _be_child(work: Callable[[], bytes], writer: int, seconds: float, extra_bytes: int) -> None:
    # Nothing may leave this function: not an exception, not a word on a stream, not the parent's clean-up.
    try:
        isolated_child.hush()
        isolated_child.fence(seconds, extra_bytes, is_last=True)
        isolated_child.send(writer, isolated_child.answer_of(work))
    finally:
        os._exit(0)


def _listen(reader: int, deadline: float) -> bytes | None:
    """Return all that the child says, or None if it does not finish in time."""
    answer = bytearray()
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([reader], [], [], left)[0]:
            return None
        piece = os.read(reader, _PIECE_BYTES)
        if not piece:
            return bytes(answer)
        answer += piece
    return None
