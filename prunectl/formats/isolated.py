"""Work in a forked child, for libraries that a crafted file can crash or keep busy for ever."""

from __future__ import annotations

import os
import re
import resource
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path

from prunectl.errors import NO_ROOM, InputError

_OUT_OF_TIME = "takes too long to read: it is damaged, or made to keep its reader busy"
_PIECE_BYTES = 1 << 16
_PATIENCE = 20
"""How much longer than it may reckon a child may take on a machine that is busy with other things."""
_OVER_TIME = frozenset({signal.SIGPROF, signal.SIGXCPU})
_DONE, _REFUSED, _FAILED, _NO_ROOM = b"D", b"R", b"F", b"N"


def in_child(work: Callable[[], bytes], path: Path, *, seconds: float, extra_bytes: int) -> bytes:
    """Return what ``work`` returns in a child of its own; whatever kills the child is the file's fault.

    The seconds are of processor time, so that a busy machine is not taken for a hostile file. The answer is bytes that
    the caller must parse with care: a child that a file has taken over may say anything.
    """
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
    if answer is None:
        raise InputError(f"{path} {_OUT_OF_TIME}")
    if answer[:1] == _DONE:
        return answer[1:]
    if answer[:1] == _REFUSED:
        raise InputError(answer[1:].decode("utf-8", "backslashreplace"))
    if answer[:1] == _NO_ROOM:
        number = int(answer[1:])
        raise OSError(number, os.strerror(number))
    if answer[:1] == _FAILED:
        reason = answer[1:].decode("utf-8", "backslashreplace")
        raise InputError(f"{path} is truncated or damaged: {reason}")
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in _OVER_TIME:
        raise InputError(f"{path} {_OUT_OF_TIME}")
    raise InputError(f"{path} crashes the library that reads it: it is damaged or hostile")


def _be_child(work: Callable[[], bytes], writer: int, seconds: float, extra_bytes: int) -> None:
    # Nothing may leave this function: not an exception, not a word on a stream, not the parent's clean-up.
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        # The second fence, which no library can take down.
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 2))
        resource.setrlimit(resource.RLIMIT_AS, (_mapped_bytes() + extra_bytes,) * 2)
        try:
            answer = _DONE + work()
        except InputError as error:
            answer = _REFUSED + error.message.encode("utf-8", "backslashreplace")
        except MemoryError:
            answer = _FAILED + b"it asks for more memory than a file of its size can need"
        except Exception as error:  # noqa: BLE001 - h5py raises what it likes on a damaged file
            answer = _failure(error)
        view = memoryview(answer)
        while view:
            view = view[os.write(writer, view) :]
    finally:
        os._exit(0)


def _failure(error: Exception) -> bytes:
    # libhdf5 tells only in words that a disk is full.
    said = re.search(r"errno = (\d+)", str(error))
    if said is not None and int(said[1]) in NO_ROOM:
        return _NO_ROOM + said[1].encode()
    return _FAILED + (str(error) or type(error).__name__).encode("utf-8", "backslashreplace")


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


def _mapped_bytes() -> int:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 1 << 34
