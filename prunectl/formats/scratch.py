"""Scratch folders: locked by the run that made them, gone with it, and cleared by the next run if it was killed."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import signal
import stat
import tempfile
import threading
import time
import weakref
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from prunectl.errors import NO_ROOM, SCRATCH, WorkError

HIDDEN, SHOWN = ".prunectl-", "prunectl-"
"""How the names begin: beside an output, and in the temporary folder."""
LOCK, INSIDE, PACKED, OLD = "lock", "new", "packed", "old"
"""All that a folder of ours holds: its lock, what is being made, the same compressed, and what it has replaced."""
NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
"""What a filesystem without locks says, as some of NFS and FUSE are."""
_DAY = 24 * 3600
"""Where nobody can lock, a run counts as dead when nothing has been touched for so many seconds."""
_LITTLE = 1 << 20
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_cleared: set[str] = set()


class Scratch:
    """A folder in the temporary folder, for as long as this lives, or until it is removed."""

    def __init__(self) -> None:
        parent = _temporary()
        if str(parent) not in _cleared:
            # Once a process: a check of many models makes many folders.
            _cleared.add(str(parent))
            clear_stale(parent, SHOWN)
        held = Held()
        self._finalizer = weakref.finalize(self, held.release)
        try:
            held.take(parent, SHOWN)
        except BaseException:
            self.remove()
            raise
        self.path = held.inside

    def remove(self) -> None:
        """Remove the folder with what is in it."""
        self._finalizer()


@contextmanager
def temporary_folder() -> Generator[Path]:
    """Yield a folder in the temporary folder, which is removed at the end."""
    held = Scratch()
    try:
        yield held.path
    except OSError as error:
        # A write does not say where to: it was here if there is no room here.
        parent = held.path.parent.parent
        if error.errno not in NO_ROOM or shutil.disk_usage(parent).free > _LITTLE:
            raise
        raise WorkError(
            f"the temporary folder {parent} has no room: {error.strerror}; nothing was written",
            hint="name one with more: TMPDIR=/path/to/folder",
        ) from error
    finally:
        held.remove()


class Held:
    """A folder that is being made or is made, and its lock."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._made: list[Path] = []
        self._lock = -1

    @property
    def inside(self) -> Path:
        """Where to write."""
        return self._made[-1] / INSIDE

    def take(self, parent: Path, prefix: str) -> None:
        """Make the folder, noted before it is there, so that no signal finds it unknown, and lock it."""
        while True:
            folder = parent / f"{prefix}{secrets.token_hex(8)}"
            self._made.append(folder)
            try:
                os.mkdir(folder, 0o700)
            except FileExistsError:
                self._made.pop()
                continue
            except OSError as error:
                raise WorkError(f"{parent} cannot be written to: {error.strerror}") from error
            # Before it is locked, another run may take it for stale and remove it.
            with suppress(FileNotFoundError):
                self._lock = os.open(folder / LOCK, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
                _lock(self._lock, fcntl.LOCK_EX)
                with suppress(FileNotFoundError):
                    os.mkdir(folder / INSIDE)
                    return
                os.close(self._lock)
                self._lock = -1

    def release(self) -> None:
        """Remove the folder, unless this is a child of the process that made it."""
        if os.getpid() != self._owner:
            return
        with deferred():
            for folder in self._made:
                _remove(folder)
            if self._lock >= 0:
                os.close(self._lock)
                self._lock = -1


@contextmanager
def deferred() -> Generator[None]:
    """Hear of a request to stop only afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[int] = []
    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda heard_one, _: heard.append(heard_one))
        yield
    finally:
        for number, how in before.items():
            signal.signal(number, how)
        for one in dict.fromkeys(heard):
            signal.raise_signal(one)


def clear_stale(parent: Path, prefix: str) -> None:
    """Remove what runs of the same user that were killed have left; one that is alive holds its lock.

    A folder is ours if its name, its owner, its mode and all that is in it say so; nothing else is ever touched.
    """
    with suppress(OSError):
        names = [name for name in os.listdir(parent) if name.startswith(prefix) and SCRATCH.fullmatch(name)]
        for name in names:
            with suppress(OSError):
                _clear(parent / name)


def _clear(folder: Path) -> None:
    facts = os.lstat(folder)
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & _WRITABLE_BY_OTHERS:
        return
    held = set(os.listdir(folder))
    if not held:
        # Killed before it was locked. One that is alive makes itself another.
        os.rmdir(folder)
    if LOCK not in held or not held <= {LOCK, INSIDE, PACKED, OLD}:
        return
    lock = os.open(folder / LOCK, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if _lock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB) or time.time() - _touched(folder) > _DAY:
            _remove(folder)
    finally:
        os.close(lock)


def _remove(folder: Path) -> None:
    """Remove a folder, its lock last: whoever is killed meanwhile leaves what can still be told to be ours."""
    for name in (INSIDE, PACKED, OLD):
        shutil.rmtree(folder / name, ignore_errors=True)
        with suppress(OSError):
            os.unlink(folder / name)
    shutil.rmtree(folder, ignore_errors=True)


def _lock(fd: int, how: int) -> bool:
    """Lock a file; False where nobody can."""
    try:
        fcntl.flock(fd, how)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def _touched(folder: Path) -> float:
    """Return when anything in a folder was last changed."""
    times = [os.lstat(folder).st_mtime]
    for place, folders, files in os.walk(folder):
        times += [os.lstat(os.path.join(place, name)).st_mtime for name in (*folders, *files)]
    return max(times)


def _temporary() -> Path:
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise WorkError("no temporary folder can be written to", hint="name one: TMPDIR=/path/to/folder") from error
