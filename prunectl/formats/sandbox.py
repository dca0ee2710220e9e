"""A sandbox: work in a child process, for libraries that a crafted file can crash or keep busy for ever.

The children are forked by a server, a process without threads that reads no file itself: to fork beside threads may
leave a lock taken for ever in the child. It is forked off once, where this process has no threads yet; where it has
some, a fresh interpreter becomes the server.
"""

from __future__ import annotations

import json
import os
import pickle
import select
import signal
import socket
import sys
import threading
import time
from atexit import register
from collections.abc import Callable
from contextlib import suppress
from enum import Enum, auto
from pathlib import Path
from typing import cast

from prunectl.errors import InputError, WorkError
from prunectl.formats import sandbox_child
from prunectl.formats.sandbox_child import HEAD, SandboxRequest
from prunectl.formats.workers import kept_children

_OUT_OF_TIME = "takes too long to read: it is damaged or malicious"
_PIECE_BYTES = 1 << 20
_PROBE = bytes(1 << 16)
_PATIENCE = 20
"""How much longer than it may compute a child may take on a machine that is busy with other things."""
_OVER_TIME = frozenset({signal.SIGPROF, signal.SIGXCPU})
_BOOT = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from prunectl.formats.sandbox_child import serve
serve()
"""


class SandboxPolicy(Enum):
    """Where files are read that a library in C must take apart."""

    SANDBOX = auto()
    HERE = auto()
    """In this process: for files that are known to be sound, such as those of tests."""


policy = SandboxPolicy.SANDBOX
"""What holds for the whole process."""


def run_sandboxed(
    work: Callable[[], bytes | memoryview],
    path: Path,
    *,
    seconds: float,
    extra_bytes: int,
    written: tuple[Path, ...] = (),
    child: Child | None = None,
) -> bytes | bytearray:
    """What ``work`` returns in a child of its own; whatever kills the child is the file's fault.

    The work must be such that pickle can send it. The seconds are of processor time, so that a busy machine is not
    taken for a hostile file. The answer is bytes that the caller must parse with care: a child that a file has taken
    over may say anything. Of files that it writes it may be that they found no room: then they are at fault.
    """
    if policy is SandboxPolicy.HERE:
        return bytes(work())
    kept = child or _kept_child()
    if kept is not None:
        answer, status = kept.ask(work, seconds, extra_bytes)
    else:
        own = Child(is_kept=False)
        try:
            answer, status = own.ask(work, seconds, extra_bytes)
        finally:
            own.close()
    if answer is None:
        raise InputError(f"{path} {_OUT_OF_TIME}")
    outcome, payload = answer
    if outcome == sandbox_child.DONE:
        return payload
    if outcome == sandbox_child.REFUSED:
        raise InputError(payload.decode("utf-8", "backslashreplace"))
    if outcome == sandbox_child.NOT_WRITTEN:
        number, _, name = payload.partition(b" ")
        raise OSError(int(number), os.strerror(int(number)), os.fsdecode(bytes(name)) or None)
    for file in written:
        _need_room(file)
    if outcome == sandbox_child.FAILED:
        raise InputError(f"{path} is truncated or damaged: {payload.decode('utf-8', 'backslashreplace')}")
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in _OVER_TIME:
        raise InputError(f"{path} {_OUT_OF_TIME}")
    raise InputError(f"{path} crashes the library that reads it: it is damaged or malicious")


def _need_room(path: Path) -> None:
    """Raise what the system says where a file, which is thrown away now, could not have become longer.

    A library that finds no room says so in words of its own, or crashes while it tidies up.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        left = len(_PROBE)
        while left:
            left -= os.write(fd, _PROBE[:left])
        os.fsync(fd)
    finally:
        os.close(fd)


class Child:
    """Does one work after the other in the same child, and in a new one after one that has died."""

    def __init__(self, *, is_kept: bool) -> None:
        self._is_kept = is_kept
        self._pid = 0
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()

    def ask(
        self, work: Callable[[], bytes | memoryview], seconds: float, extra_bytes: int
    ) -> tuple[tuple[bytes, bytes | bytearray] | None, int]:
        """The answer, or nothing where time is up, and how the child ended if it did."""
        request = pickle.dumps(SandboxRequest(work, seconds, extra_bytes, _folder(), is_last=not self._is_kept))
        with self._lock:
            if self._socket is None:
                self._pid, self._socket = _server.fork(getattr(getattr(work, "func", work), "__module__", ""))
            try:
                answer = _exchange(self._socket, request, time.monotonic() + _PATIENCE * seconds)
            except BaseException:
                self._end()
                raise
            # One that has answered in full goes on to live; of any other the work is over.
            return answer, 0 if answer is not None and answer[0] else self._end()

    def close(self) -> None:
        """Let the child go."""
        with self._lock:
            self._end()

    def _end(self) -> int:
        if self._socket is None:
            return 0
        self._socket.close()
        pid, self._pid, self._socket = self._pid, 0, None
        return _server.end(pid)


_keeping = threading.Lock()


def _kept_child() -> Child | None:
    """The child that this context keeps, if it keeps any."""
    children = kept_children.get()
    if children is None:
        return None
    with _keeping:
        if not children:
            children.append(Child(is_kept=True))
    return cast("Child", children[0])


class _Server:
    """The process that forks the children, and how to talk to it: one question at a time, each with an answer."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner = self._pid = 0
        self._control: socket.socket | None = None

    def fork(self, module: str) -> tuple[int, socket.socket]:
        """A new child that knows a module, and what to talk to it through."""
        ours, theirs = socket.socketpair()
        with theirs, self._lock:
            try:
                try:
                    return self._forked(theirs, module), ours
                except (BrokenPipeError, ConnectionResetError, EOFError):
                    # Somebody killed it.
                    self._stop()
                    return self._forked(theirs, module), ours
            except BaseException as error:
                ours.close()
                # A question without its answer: nobody knows any more whose the next answer would be.
                self._stop()
                if isinstance(error, OSError | EOFError):
                    raise WorkError(f"the process that reads the file cannot be started: {error}") from error
                raise

    def end(self, pid: int) -> int:
        """End a child, and return how it ended."""
        with self._lock:
            if self._control is None or self._owner != os.getpid():
                return signal.SIGKILL
            try:
                self._control.sendall(sandbox_child.QUESTION.pack(sandbox_child.END, pid))
                return int(sandbox_child.ANSWER.unpack(_whole(self._control, sandbox_child.ANSWER.size))[0])
            except (OSError, EOFError):
                self._stop()
                return signal.SIGKILL
            except BaseException:
                self._stop()
                raise

    def stop(self) -> None:
        """End the server, and with it all children."""
        with self._lock:
            self._stop()

    def _forked(self, theirs: socket.socket, module: str) -> int:
        control = self._started()
        socket.send_fds(
            control, [sandbox_child.QUESTION.pack(sandbox_child.FORK, len(module.encode()))], [theirs.fileno()]
        )
        control.sendall(module.encode())
        (pid,) = sandbox_child.ANSWER.unpack(_whole(control, sandbox_child.ANSWER.size))
        if pid < 0:
            raise OSError(-pid, os.strerror(-pid))
        return int(pid)

    def _started(self) -> socket.socket:
        if self._control is not None and self._owner == os.getpid():
            return self._control
        if self._control is not None:
            # The server of the process that forked this one.
            self._control.close()
        ours, theirs = socket.socketpair()
        with theirs:
            self._pid = _forked_server(theirs) if _is_alone() else _spawned_server(theirs)
        self._control, self._owner = ours, os.getpid()
        return ours

    def _stop(self) -> None:
        if self._control is None or self._owner != os.getpid():
            return
        # Others that this process has forked may hold it open.
        with suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)
        self._control.close()
        self._control = None
        with suppress(ChildProcessError):
            os.waitpid(self._pid, 0)


_server = _Server()
# So that what it has cost is counted with what this process has.
register(_server.stop)


def _is_alone() -> bool:
    """Whether this process has a single thread, those of libraries counted: only Linux tells."""
    try:
        return sys.platform == "linux" and len(os.listdir("/proc/self/task")) == 1
    except OSError:
        return False


def _forked_server(control: socket.socket) -> int:
    pid = os.fork()
    if pid == 0:
        # Nothing may leave this branch: not an exception, not a word on a stream, not the parent's clean-up.
        try:
            sandbox_child.settle(control.fileno())
            sandbox_child.serve()
        finally:
            os._exit(0)
    return pid


def _spawned_server(control: socket.socket) -> int:
    nowhere = [(os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_WRONLY, 0) for stream in (1, 2)]
    return os.posix_spawn(
        sys.executable,
        [sys.executable, "-c", _BOOT, json.dumps([os.path.abspath(entry) for entry in sys.path])],
        {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        file_actions=[(os.POSIX_SPAWN_DUP2, control.fileno(), 0), *nowhere],
    )


def _exchange(channel: socket.socket, request: bytes, deadline: float) -> tuple[bytes, bytes | bytearray] | None:
    """Send a request and return its answer; None if it does not come in time, empty bytes if the child has died."""
    try:
        channel.sendall(HEAD.pack(b"?", len(request)))
        channel.sendall(request)
    except OSError:
        return b"", b""
    answer = bytearray()
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([channel], [], [], left)[0]:
            return None
        try:
            piece = channel.recv(_PIECE_BYTES)
        except ConnectionResetError:
            piece = b""
        if not piece:
            return b"", b""
        answer += piece
        if len(answer) >= HEAD.size:
            how, nbytes = HEAD.unpack_from(answer)
            if len(answer) >= HEAD.size + nbytes:
                # In place: it may be as big as a tensor.
                del answer[: HEAD.size]
                return how, answer
    return None


def _whole(channel: socket.socket, nbytes: int) -> bytes:
    data = b""
    while len(data) < nbytes:
        piece = channel.recv(nbytes - len(data))
        if not piece:
            raise EOFError("it has ended")
        data += piece
    return data


def _folder() -> str:
    """Where paths begin that a request names; nowhere, if that folder is gone."""
    with suppress(OSError):
        return os.getcwd()
    return ""
