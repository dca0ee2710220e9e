"""Scratch folders: locked by the run that made them, gone with it, and cleared by the next run if it was killed."""

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

from prunectl.errors import NO_ROOM, SCRATCH, WorkError
from prunectl.formats.base import ModelFile

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
temporary_folder_is_shared: ContextVar[bool] = ContextVar("temporary_folder_is_shared", default=False)
"""Whether threads of another program's may use the temporary folder meanwhile: their files would go with a run's."""


class Scratch:
    """A folder in the temporary folder, for as long as this lives, or until it is removed."""

    def __init__(self) -> None:
        parent = _temporary()
        if str(parent) not in _cleared:
            # Once a process: a check of many models makes many folders.
            _cleared.add(str(parent))
            clear_stale(parent, SHOWN)
        held = LockedFolder()
        self._finalizer = weakref.finalize(self, held.release)
        try:
            held.take(parent, SHOWN)
            self.path = held.inside_as_text()
        except BaseException:
            self.remove()
            raise

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
            f"the temporary folder {parent} has no space: {error.strerror}; nothing was written",
            hint="use a folder with more space: TMPDIR=/path/to/folder",
        ) from error
    finally:
        held.remove()


@contextmanager
def temporary_files() -> Generator[Path]:
    """Yield such a folder, into which frameworks put their temporary files: the next run clears it if one is killed.

    TensorFlow writes each function that it has rewritten to a file, and an interrupt may abort it. In the program of
    somebody else its files go where all temporary files of that program go.
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
    """Whether frameworks can read a path: they take names of UTF-8 alone, a file system any bytes."""
    return not any("\ud800" <= character <= "\udfff" for character in str(path))


def utf8_path(path: Path, link: Path) -> Path:
    """A path that frameworks can read: through a link to its folder, or to itself where its own name is the trouble."""
    if is_text(path):
        return path
    if is_text(Path(path.name)):
        link.symlink_to(path.parent.absolute(), target_is_directory=True)
        return link / path.name
    link.symlink_to(path.absolute(), target_is_directory=path.is_dir())
    return link


class LockedFolder:
    """A folder that is being made or is made, and its lock."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._made: list[Path] = []
        self._lock = -1

    @property
    def inside(self) -> Path:
        """Where to write."""
        return self._made[-1] / INSIDE

    def inside_as_text(self) -> Path:
        """The same under a name that frameworks can read."""
        if not is_text(self.inside):
            inside = os.open(self.inside, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            # By the number of this process, since its children look into it too. It stays open, though the folder goes:
            # TensorFlow removes its files at exit, and the number might be that of another file by then.
            return Path(f"/proc/{os.getpid()}/fd/{inside}")
        return self.inside

    def take(self, parent: Path, prefix: str) -> None:
        """Make the folder, noted before it is there, so that no signal finds it unknown, and lock it."""
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
        with deferred_signals():
            for folder in self._made:
                _remove(folder)
            if self._lock >= 0:
                os.close(self._lock)
                self._lock = -1


@contextmanager
def deferred_signals() -> Generator[None]:
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
    """When anything in a folder was last changed."""
    times = [os.lstat(folder).st_mtime]
    for place, folders, files in os.walk(folder):
        times += [os.lstat(os.path.join(place, name)).st_mtime for name in (*folders, *files)]
    return max(times)


def _temporary() -> Path:
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise WorkError("there is no writable temporary folder", hint="choose one: TMPDIR=/path/to/folder") from error


_BITS = 0o777
_READ_WRITE = 0o666


def set_modes(folder: Path, parent: Path, origins: Mapping[Path, Path], model: ModelFile | None) -> None:
    """Give everything in a folder, which goes to a parent, the mode that it is to have there.

    As `cp` does: a new file gets the mode of its origin without what the umask takes; one that replaces another gets
    the mode and, as far as possible, the owner of that. What has no origin of its own (another format, code beside the
    weights) may be read by those who may read all of the model.
    """
    # What the umask, or the access list of the parent, left of a folder that was made with all permissions.
    allowed = stat.S_IMODE(folder.stat().st_mode) & _BITS
    modes = {name: _mode(source) for name, source in origins.items()}
    least = None if model is None else reduce(and_, map(_mode, model.files), _READ_WRITE)
    if model is not None and (model.folder is not None or model.path.is_dir()):
        for name, source in origins.items():
            # Folders of a model that is a folder; the file lies as deep in it as its copy does.
            for copy, own in zip(name.parents, source.parents, strict=False):
                if copy != Path():
                    # One that may not be written to could not be moved either.
                    modes[copy] = _mode(own) | stat.S_IRWXU
    for here, folders, files in os.walk(folder):
        for entry in (*folders, *files):
            new = Path(here, entry)
            relative = new.relative_to(folder)
            replaced = _replaced(parent / relative)
            mode = modes.get(relative, least if entry in files else None)
            if replaced is not None:
                _be_like(new, replaced)
            elif mode is not None:
                _set(new, mode & allowed)


def _replaced(path: Path) -> os.stat_result | None:
    """What is known of a file or folder that is there; nothing of a link, whose own mode says nothing."""
    with suppress(OSError):
        facts = os.lstat(path)
        if stat.S_ISREG(facts.st_mode) or stat.S_ISDIR(facts.st_mode):
            return facts
    return None


def _be_like(new: Path, old: os.stat_result) -> None:
    mode, own = old.st_mode & _BITS, os.lstat(new)
    if (own.st_uid, own.st_gid) != (old.st_uid, old.st_gid):
        try:
            os.chown(new, old.st_uid, old.st_gid)
        except OSError:
            try:
                os.chown(new, -1, old.st_gid)
            except OSError:
                # A group that may not be given: what only the old one might do, this one may not.
                mode &= ~0o070 | (mode & 0o007) << 3
    _set(new, mode)


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode) & _BITS


def _set(path: Path, mode: int) -> None:
    # Filesystems without modes refuse to set them.
    with suppress(OSError):
        os.chmod(path, mode)
