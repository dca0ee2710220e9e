"""What the processes of a sandbox do: a server forks, a child does some work behind fences, answered in bytes."""

from __future__ import annotations

import gc
import importlib
import os
import pickle
import re
import resource
import signal
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from prunectl.errors import NO_ROOM, InputError, is_of_output

DONE, REFUSED, FAILED, NOT_WRITTEN = b"D", b"R", b"F", b"N"
HEAD = struct.Struct("<cQ")
"""Before what is said: how it went, and how many bytes follow."""
QUESTION = struct.Struct("<cI")
"""To fork a child that knows a module whose name is so long; to end the child of that number."""
FORK, END = b"F", b"E"
_LAST_STREAM = 2
ANSWER = struct.Struct("<q")
"""The number of a child, or how one ended; less than zero for an error of the system."""


@dataclass(frozen=True, slots=True)
class SandboxRequest:
    """Some work, and what it may take."""

    work: Callable[[], bytes | memoryview]
    seconds: float
    extra_bytes: int
    folder: str
    """Where its paths begin."""
    is_last: bool
    """Whether the fences stay for good, which no library can take down then."""


def settle(control: int) -> None:
    """Make a process that was forked off a server: it keeps nothing of its parent's but the control, as its input."""
    gc.disable()
    os.dup2(control, 0)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def serve() -> None:
    """Fork children, and end them, until whoever asks is gone."""
    gc.disable()
    _close_what_is_others()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # The terminal sends it to all, and the parent knows best what to do.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    control = socket.socket(fileno=0)
    living: set[int] = set()
    try:
        while question := _question(control):
            what, number, channels = question
            if what == FORK:
                module = _read(0, number).decode()
                answer = _fork(control, channels[0], module)
                os.close(channels[0])
                living.add(answer)
            else:
                answer = _ended(number)
                living.discard(number)
            control.sendall(ANSWER.pack(answer))
    finally:
        for child in living:
            with suppress(OSError):
                _ended(child)
        os._exit(0)


def _close_what_is_others() -> None:
    """Close all but the streams: a pipe or a lock that were kept open here would never be seen to end."""
    with suppress(OSError):
        for name in os.listdir("/proc/self/fd"):
            if int(name) > _LAST_STREAM:
                with suppress(OSError):
                    os.close(int(name))


def _question(control: socket.socket) -> tuple[bytes, int, list[int]] | None:
    request, channels, _, _ = socket.recv_fds(control, QUESTION.size, 1)
    if not request:
        return None
    request += _read(0, QUESTION.size - len(request))
    what, number = QUESTION.unpack(request)
    return what, number, channels


def _fork(control: socket.socket, channel: int, module: str) -> int:
    # Imported here once, and not by every child again.
    with suppress(Exception):
        importlib.import_module(module)
    try:
        child = os.fork()
    except OSError as error:
        return -(error.errno or 1)
    if child == 0:
        try:
            control.close()
            while head := _read(channel, HEAD.size):
                # What the parent says may be unpickled; what a child says is bytes.
                request: SandboxRequest = pickle.loads(_read(channel, HEAD.unpack(head)[1]))  # noqa: S301
                with suppress(OSError):
                    os.chdir(request.folder)
                _fence(request)
                how, answer = run_and_encode(request.work)
                if not request.is_last:
                    signal.setitimer(signal.ITIMER_PROF, 0)
                _send(channel, HEAD.pack(how, memoryview(answer).nbytes))
                _send(channel, answer)
        finally:
            os._exit(0)
    return child


def _ended(child: int) -> int:
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def _fence(request: SandboxRequest) -> None:
    """Take some seconds of processor time and some memory for the most, from now on."""
    signal.setitimer(signal.ITIMER_PROF, request.seconds)
    used = resource.getrusage(resource.RUSAGE_SELF)
    # The second fence.
    most = int(used.ru_utime + used.ru_stime + request.seconds) + 1
    _limit(resource.RLIMIT_CPU, most, 1 if request.is_last else None)
    _limit(resource.RLIMIT_AS, _mapped_bytes() + request.extra_bytes, 0 if request.is_last else None)


def _limit(kind: int, most: int, beyond: int | None) -> None:
    """Set the soft limit, and with something beyond it the hard one as well."""
    old = resource.getrlimit(kind)[1]
    most = most if old == resource.RLIM_INFINITY else min(most, old)
    hard = old if beyond is None else most + beyond
    resource.setrlimit(kind, (most, hard if old == resource.RLIM_INFINITY else min(hard, old)))


def run_and_encode(work: Callable[[], bytes | memoryview]) -> tuple[bytes, bytes | memoryview]:
    """What comes of some work: how it went, and the bytes."""
    try:
        return DONE, work()
    except InputError as error:
        return REFUSED, error.message.encode("utf-8", "backslashreplace")
    except MemoryError:
        return FAILED, b"it asks for more memory than a file of its size can need"
    except Exception as error:  # noqa: BLE001 - h5py raises what it likes on a damaged file
        return _failure(error)


def _failure(error: Exception) -> tuple[bytes, bytes]:
    # libhdf5 tells only in words that a disk is full.
    match = re.search(r"errno = (\d+)", str(error))
    if match is not None and int(match[1]) in NO_ROOM:
        return NOT_WRITTEN, match[1].encode()
    if isinstance(error, OSError) and is_of_output(error):
        return NOT_WRITTEN, f"{error.errno} ".encode() + os.fsencode(error.filename or "")
    return FAILED, (str(error) or type(error).__name__).encode("utf-8", "backslashreplace")


def _read(channel: int, nbytes: int) -> bytes:
    """A number of bytes, or fewer where the other side is gone."""
    data = bytearray()
    while len(data) < nbytes and (piece := os.read(channel, min(nbytes - len(data), 1 << 20))):
        data += piece
    return bytes(data)


def _send(channel: int, answer: bytes | memoryview) -> None:
    view = memoryview(answer).cast("B")
    while view:
        view = view[os.write(channel, view) :]


def _mapped_bytes() -> int:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 1 << 34
