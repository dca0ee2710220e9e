"""A sandbox: run work in a child process, for libraries that a crafted file can crash or keep busy forever.

The children are forked by a fork server, a process without threads that reads no files itself: a fork of a process with
threads may copy a lock that is never released. The server is forked from this process as long as it has a single
thread; otherwise, a fresh interpreter becomes the server.
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
_WALL_CLOCK_FACTOR = 20
"""Wall-clock time that a child may take on a busy machine, as a multiple of its limit on processor time."""
_OVER_TIME = frozenset({signal.SIGPROF, signal.SIGXCPU})
_SERVER_CODE = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from prunectl.formats.sandbox_child import serve
serve()
"""


class SandboxPolicy(Enum):
    """The process in which C libraries parse files."""

    SANDBOX = auto()
    HERE = auto()
    """This process: for trusted files, such as those of tests."""


policy = SandboxPolicy.SANDBOX
"""The policy of the whole process."""


def run_sandboxed(
    work: Callable[[], bytes | memoryview],
    path: Path,
    *,
    seconds: float,
    extra_bytes: int,
    written: tuple[Path, ...] = (),
    child: Child | None = None,
) -> bytes | bytearray:
    """Run ``work`` in a child process and return its bytes; if the child dies, the file at `path` is blamed.

    The work must be picklable. The seconds are processor time, so that a busy machine does not make a file look
    malicious. The caller must parse the result with care, because a crafted file may have taken over the child. If the
    child fails, it may have had no space for the files in `written`: this is checked first, and raises OSError.
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
    """Raise OSError if a file, which is discarded afterwards, cannot grow by 64 KiB.

    A library that finds no space on the disk raises errors of its own kind, or crashes while it cleans up.
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
    """A child process that does one task after another; a new process replaces one that has died."""

    def __init__(self, *, is_kept: bool) -> None:
        self._is_kept = is_kept
        self._pid = 0
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()

    def ask(
        self, work: Callable[[], bytes | memoryview], seconds: float, extra_bytes: int
    ) -> tuple[tuple[bytes, bytes | bytearray] | None, int]:
        """The answer (outcome and payload; None if time is up), and the exit status of the child if it has ended."""
        request = pickle.dumps(SandboxRequest(work, seconds, extra_bytes, _folder(), is_last=not self._is_kept))
        with self._lock:
            if self._socket is None:
                self._pid, self._socket = _server.fork(getattr(getattr(work, "func", work), "__module__", ""))
            try:
                answer = _exchange(self._socket, request, time.monotonic() + _WALL_CLOCK_FACTOR * seconds)
            except BaseException:
                self._end()
                raise
            # A child that has answered in full is kept; any other is ended.
            return answer, 0 if answer is not None and answer[0] else self._end()

    def close(self) -> None:
        """End the child."""
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
    """The child that this context reuses, if it reuses any (`kept_children`)."""
    children = kept_children.get()
    if children is None:
        return None
    with _keeping:
        if not children:
            children.append(Child(is_kept=True))
    return cast("Child", children[0])


class _Server:
    """The client of the fork server, which answers one question at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner = self._pid = 0
        self._control: socket.socket | None = None

    def fork(self, module: str) -> tuple[int, socket.socket]:
        """The pid of a new child, in which a module is imported already, and the socket that leads to it."""
        ours, theirs = socket.socketpair()
        with theirs, self._lock:
            try:
                try:
                    return self._forked(theirs, module), ours
                except (BrokenPipeError, ConnectionResetError, EOFError):
                    # Another process has killed the server.
                    self._stop()
                    return self._forked(theirs, module), ours
            except BaseException as error:
                ours.close()
                # The question has no answer yet, so that a later one could not be assigned to its question.
                self._stop()
                if isinstance(error, OSError | EOFError):
                    raise WorkError(f"the process that reads the file cannot be started: {error}") from error
                raise

    def end(self, pid: int) -> int:
        """End a child, and return its exit status."""
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
            # This process was forked, and the server belongs to its parent.
            self._control.close()
        ours, theirs = socket.socketpair()
        with theirs:
            self._pid = _forked_server(theirs) if _is_alone() else _spawned_server(theirs)
        self._control, self._owner = ours, os.getpid()
        return ours

    def _stop(self) -> None:
        if self._control is None or self._owner != os.getpid():
            return
        # A forked process may hold the socket open as well, so that closing it here would not be noticed.
        with suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)
        self._control.close()
        self._control = None
        with suppress(ChildProcessError):
            os.waitpid(self._pid, 0)


_server = _Server()
# Waiting for the server adds its resource usage to that of this process.
register(_server.stop)


def _is_alone() -> bool:
    """Whether this process has a single thread, including those of libraries; only Linux provides their number."""
    try:
        return sys.platform == "linux" and len(os.listdir("/proc/self/task")) == 1
    except OSError:
        return False


def _forked_server(control: socket.socket) -> int:
    pid = os.fork()
    if pid == 0:
        # No exception may leave this branch, no output may be written, and no cleanup of the parent may run.
        try:
            sandbox_child.become_server(control.fileno())
            sandbox_child.serve()
        finally:
            os._exit(0)
    return pid


def _spawned_server(control: socket.socket) -> int:
    nowhere = [(os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_WRONLY, 0) for stream in (1, 2)]
    return os.posix_spawn(
        sys.executable,
        [sys.executable, "-c", _SERVER_CODE, json.dumps([os.path.abspath(entry) for entry in sys.path])],
        {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        file_actions=[(os.POSIX_SPAWN_DUP2, control.fileno(), 0), *nowhere],
    )


def _exchange(channel: socket.socket, request: bytes, deadline: float) -> tuple[bytes, bytes | bytearray] | None:
    """Send a request and return its answer; None if time is up, empty bytes if the child has died."""
    try:
        channel.sendall(HEAD.pack(b"?", len(request)))
        channel.sendall(request)
    except OSError:
        return b"", b""
    answer = bytearray()
    while (seconds_left := deadline - time.monotonic()) > 0:
        if not select.select([channel], [], [], seconds_left)[0]:
            return None
        try:
            piece = channel.recv(_PIECE_BYTES)
        except ConnectionResetError:
            piece = b""
        if not piece:
            return b"", b""
        answer += piece
        if len(answer) >= HEAD.size:
            outcome, nbytes = HEAD.unpack_from(answer)
            if len(answer) >= HEAD.size + nbytes:
                # In place, because the answer may be as big as a tensor.
                del answer[: HEAD.size]
                return outcome, answer
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
    """The current folder, to which paths in a request are relative; empty if it was removed."""
    with suppress(OSError):
        return os.getcwd()
    return ""
