"""Scratch folders: locked by the run that made them and removed at its end, or by the next run if it was killed."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import stat
import tempfile
import threading
import time
import weakref
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import reduce
from operator import and_
from pathlib import Path

from prunectl.errors import NO_ROOM, SCRATCH, UsageError, WorkError
from prunectl.formats.base import ModelFile

HIDDEN, SHOWN = ".prunectl-", "prunectl-"
"""Name prefixes of scratch folders beside an output, and in the temporary folder."""
LOCK, INSIDE, PACKED, OLD = "lock", "new", "packed", "old"
"""The only entries of a scratch folder: its lock, the new output, the compressed output, and the replaced output."""
NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
"""Errors of filesystems without locks, such as some of NFS and FUSE."""
_STALE_SECONDS = 24 * 3600
"""On a filesystem without locks, a run counts as dead when its files have not changed for so many seconds."""
_MIN_FREE_BYTES = 1 << 20
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_cleared: set[str] = set()
temporary_folder_is_shared: ContextVar[bool] = ContextVar("temporary_folder_is_shared", default=False)
"""Whether threads of a program that uses prunectl's API may need `tempfile` too: a run would remove their files."""


class Scratch:
    """A scratch folder in the temporary folder, which is removed with this object, or earlier by `remove`."""

    def __init__(self) -> None:
        parent = _temporary()
        if str(parent) not in _cleared:
            # Once for each process, because a check of many models makes many folders.
            _cleared.add(str(parent))
            clear_stale(parent, SHOWN)
        folder = LockedFolder()
        self._finalizer = weakref.finalize(self, folder.release)
        try:
            folder.take(parent, SHOWN)
            self.path = folder.inside_as_text()
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Remove the folder and its content."""
        self._finalizer()


@contextmanager
def temporary_folder() -> Generator[Path]:
    """Yield a scratch folder in the temporary folder, which is removed at the end."""
    scratch = Scratch()
    try:
        yield scratch.path
    except OSError as error:
        # The error of a write has no file name: it came from this folder if its disk is full.
        parent = scratch.path.parent.parent
        if error.errno not in NO_ROOM or shutil.disk_usage(parent).free > _MIN_FREE_BYTES:
            raise
        raise WorkError(
            f"the temporary folder {parent} has no space: {error.strerror}; nothing was written",
            hint="use a folder with more space: TMPDIR=/path/to/folder",
        ) from error
    finally:
        scratch.remove()


@contextmanager
def temporary_files() -> Generator[Path]:
    """Yield a scratch folder in which frameworks create their temporary files, so that none outlives a killed run.

    TensorFlow writes each function that it has rewritten to a file, and an interrupt may abort it. If another program
    uses the API (`temporary_folder_is_shared`), the frameworks' files go to that program's temporary folder.
    """
    with temporary_folder() as folder:
        if temporary_folder_is_shared.get():
            yield folder
            return
        before, tempfile.tempdir = tempfile.tempdir, str(folder)
        try:
            yield folder
        finally:
            tempfile.tempdir = before


def is_text(path: Path) -> bool:
    """Whether frameworks can read a path: they accept only UTF-8, while file systems allow any bytes."""
    return not any("\ud800" <= character <= "\udfff" for character in str(path))


def check_is_text(name: str) -> None:
    """Refuse a name that the files of a model cannot give for each other."""
    if not is_text(Path(name)):
        raise UsageError(
            f"{name} is not UTF-8, in which the files of this model name each other",
            hint="choose another --output",
        )


def utf8_path(path: Path, link: Path) -> Path:
    """A path that frameworks can read: if it is not UTF-8, through a link to its folder, or else to the file itself."""
    if is_text(path):
        return path
    if is_text(Path(path.name)):
        link.symlink_to(path.parent.absolute(), target_is_directory=True)
        return link / path.name
    link.symlink_to(path.absolute(), target_is_directory=path.is_dir())
    return link


class LockedFolder:
    """A scratch folder and its lock."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._made: list[Path] = []
        self._lock = -1

    @property
    def inside(self) -> Path:
        """The folder for the new files."""
        return self._made[-1] / INSIDE

    def inside_as_text(self) -> Path:
        """The folder `inside` by a path that frameworks can read."""
        if not is_text(self.inside):
            inside = os.open(self.inside, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            # By this process's pid, as its children use the path too. The descriptor stays open after the folder is
            # removed: TensorFlow removes its files at exit, when the number could be that of another file.
            return Path(f"/proc/{os.getpid()}/fd/{inside}")
        return self.inside

    def take(self, parent: Path, prefix: str) -> None:
        """Create and lock the folder; it is recorded before, so that `release` removes it after any signal."""
        while True:
            folder = parent / f"{prefix}{os.urandom(8).hex()}"
            self._made.append(folder)
            try:
                os.mkdir(folder, 0o700)
            except FileExistsError:
                self._made.pop()
                continue
            except OSError as error:
                raise WorkError(f"{parent} cannot be written to: {error.strerror}") from error
            # Until the folder is locked, another run may take it for stale and remove it.
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
        with deferred_signals():
            for folder in self._made:
                _remove(folder)
            if self._lock >= 0:
                os.close(self._lock)
                self._lock = -1


@contextmanager
def deferred_signals() -> Generator[None]:
    """Defer SIGINT and SIGTERM until the end of the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    handlers = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers[number] = signal.signal(number, lambda signum, _: received.append(signum))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for signum in dict.fromkeys(received):
            signal.raise_signal(signum)


def clear_stale(parent: Path, prefix: str) -> None:
    """Remove the scratch folders that killed runs of this user have left; a live run holds the lock of its folder.

    A folder is removed only if its name, owner, mode and all of its entries are those of a scratch folder.
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
    entries = set(os.listdir(folder))
    if not entries:
        # Its run was killed before it locked the folder. A live run creates another one.
        os.rmdir(folder)
    if LOCK not in entries or not entries <= {LOCK, INSIDE, PACKED, OLD}:
        return
    lock = os.open(folder / LOCK, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if _lock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB) or time.time() - _touched(folder) > _STALE_SECONDS:
            _remove(folder)
    finally:
        os.close(lock)


def _remove(folder: Path) -> None:
    """Remove a folder, with its lock last, so that after a kill the rest is still recognised as a scratch folder."""
    for name in (INSIDE, PACKED, OLD):
        shutil.rmtree(folder / name, ignore_errors=True)
        with suppress(OSError):
            os.unlink(folder / name)
    shutil.rmtree(folder, ignore_errors=True)


def _lock(fd: int, how: int) -> bool:
    """Lock a file; False if the filesystem has no locks."""
    try:
        fcntl.flock(fd, how)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def _touched(folder: Path) -> float:
    """The last mtime of a folder and its content."""
    times = [os.lstat(folder).st_mtime]
    for parent, folders, files in os.walk(folder):
        times += [os.lstat(os.path.join(parent, name)).st_mtime for name in (*folders, *files)]
    return max(times)


def _temporary() -> Path:
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise WorkError("there is no writable temporary folder", hint="choose one: TMPDIR=/path/to/folder") from error


_PERMISSIONS = 0o777
_READ_WRITE = 0o666


def set_modes(folder: Path, parent: Path, origins: Mapping[Path, Path], model: ModelFile | None) -> None:
    """Set the modes of all files and folders in a scratch folder before they are moved to `parent`.

    As with `cp`, a new file gets the mode of its origin, restricted by the umask; a file that replaces another gets
    that one's mode and, where possible, its owner. A file without an origin (another format, code beside the weights)
    may be read by those who may read all files of the model.
    """
    # The folder was created with all permissions, of which the umask or the parent's default ACL has left these.
    allowed = stat.S_IMODE(folder.stat().st_mode) & _PERMISSIONS
    modes = {name: _mode(source) for name, source in origins.items()}
    least = None if model is None else reduce(and_, map(_mode, model.files), _READ_WRITE)
    if model is not None and (model.folder is not None or model.path.is_dir()):
        for name, source in origins.items():
            # The folders around the file; its copy lies at the same depth.
            for copy, own in zip(name.parents, source.parents, strict=False):
                if copy != Path():
                    # A folder that is not writable could not be moved.
                    modes[copy] = _mode(own) | stat.S_IRWXU
    for here, folders, files in os.walk(folder):
        for entry in (*folders, *files):
            new = Path(here, entry)
            relative = new.relative_to(folder)
            replaced = _replaced(parent / relative)
            mode = modes.get(relative, least if entry in files else None)
            if replaced is not None:
                _copy_permissions(new, replaced)
            elif mode is not None:
                _set(new, mode & allowed)


def _replaced(path: Path) -> os.stat_result | None:
    """The stat of an existing file or folder; None for a link, whose own mode has no meaning."""
    with suppress(OSError):
        facts = os.lstat(path)
        if stat.S_ISREG(facts.st_mode) or stat.S_ISDIR(facts.st_mode):
            return facts
    return None


def _copy_permissions(new: Path, old: os.stat_result) -> None:
    mode, own = old.st_mode & _PERMISSIONS, os.lstat(new)
    if (own.st_uid, own.st_gid) != (old.st_uid, old.st_gid):
        try:
            os.chown(new, old.st_uid, old.st_gid)
        except OSError:
            try:
                os.chown(new, -1, old.st_gid)
            except OSError:
                # The group cannot be changed: the new group gets no permissions that others do not have.
                mode &= ~0o070 | (mode & 0o007) << 3
    _set(new, mode)


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode) & _PERMISSIONS


def _set(path: Path, mode: int) -> None:
    # Filesystems without modes refuse to set them.
    with suppress(OSError):
        os.chmod(path, mode)
