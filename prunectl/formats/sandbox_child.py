"""The processes of the sandbox: a fork server, and children that do work under resource limits and answer in bytes."""

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
"""Header of a request or an answer: `?` or the outcome, and the number of bytes that follow."""
QUESTION = struct.Struct("<cI")
"""FORK with the length of the name of a module to import first, or END with the pid of a child."""
FORK, END = b"F", b"E"
_LAST_STREAM = 2
ANSWER = struct.Struct("<q")
"""The pid of a new child, or the exit status of an ended one; a negative errno if the fork failed."""


@dataclass(frozen=True, slots=True)
class SandboxRequest:
    """Some work, and its resource limits."""

    work: Callable[[], bytes | memoryview]
    seconds: float
    extra_bytes: int
    folder: str
    """The folder to which its paths are relative."""
    is_last: bool
    """Whether the limits are hard ones, which no library can raise, because the child gets no further work."""


def become_server(control: int) -> None:
    """Prepare a forked process to be the server: the control socket becomes its stdin, and its output is discarded."""
    gc.disable()
    os.dup2(control, 0)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def serve() -> None:
    """Fork and end children on request, until the client has closed the control socket."""
    gc.disable()
    _close_inherited()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # The terminal sends SIGINT to all processes; the parent decides how to handle it.
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
                answer = _end_child(number)
                living.discard(number)
            control.sendall(ANSWER.pack(answer))
    finally:
        for child in living:
            with suppress(OSError):
                _end_child(child)
        os._exit(0)


def _close_inherited() -> None:
    """Close all file descriptors but the streams: an inherited pipe would not end, nor a lock be released."""
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
    # Imported in the server, so that not every child has to import the module again.
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
                # The parent's request may be unpickled; a child's answer must not be, and is plain bytes.
                request: SandboxRequest = pickle.loads(_read(channel, HEAD.unpack(head)[1]))  # noqa: S301
                with suppress(OSError):
                    os.chdir(request.folder)
                _limit_resources(request)
                outcome, answer = run_and_encode(request.work)
                if not request.is_last:
                    signal.setitimer(signal.ITIMER_PROF, 0)
                _send(channel, HEAD.pack(outcome, memoryview(answer).nbytes))
                _send(channel, answer)
        finally:
            os._exit(0)
    return child


def _end_child(child: int) -> int:
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def _limit_resources(request: SandboxRequest) -> None:
    """Limit the processor time and the additional memory of this process from now on."""
    signal.setitimer(signal.ITIMER_PROF, request.seconds)
    used = resource.getrusage(resource.RUSAGE_SELF)
    # A second limit, in whole seconds, in case a library disables the timer or its signal.
    most = int(used.ru_utime + used.ru_stime + request.seconds) + 1
    _limit(resource.RLIMIT_CPU, most, 1 if request.is_last else None)
    _limit(resource.RLIMIT_AS, _mapped_bytes() + request.extra_bytes, 0 if request.is_last else None)


def _limit(kind: int, most: int, beyond: int | None) -> None:
    """Set a soft limit and, unless `beyond` is None, the hard limit that far above it."""
    old = resource.getrlimit(kind)[1]
    most = most if old == resource.RLIM_INFINITY else min(most, old)
    hard = old if beyond is None else most + beyond
    resource.setrlimit(kind, (most, hard if old == resource.RLIM_INFINITY else min(hard, old)))


def run_and_encode(work: Callable[[], bytes | memoryview]) -> tuple[bytes, bytes | memoryview]:
    """Run some work, and return its outcome and its bytes, or those of the error."""
    try:
        return DONE, work()
    except InputError as error:
        return REFUSED, error.message.encode("utf-8", "backslashreplace")
    except MemoryError:
        return FAILED, b"it asks for more memory than a file of its size can need"
    except Exception as error:  # noqa: BLE001 - h5py raises what it likes on a damaged file
        return _failure(error)


def _failure(error: Exception) -> tuple[bytes, bytes]:
    # libhdf5 gives the errno of a full disk only in the text of its message.
    match = re.search(r"errno = (\d+)", str(error))
    if match is not None and int(match[1]) in NO_ROOM:
        return NOT_WRITTEN, match[1].encode()
    if isinstance(error, OSError) and is_of_output(error):
        return NOT_WRITTEN, f"{error.errno} ".encode() + os.fsencode(error.filename or "")
    return FAILED, (str(error) or type(error).__name__).encode("utf-8", "backslashreplace")


def _read(channel: int, nbytes: int) -> bytes:
    """Read so many bytes, or fewer if the other side has closed the channel."""
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
