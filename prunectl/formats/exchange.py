"""Renames that a plain one cannot do: two paths change places in one step; a path is taken only if it is free."""

from __future__ import annotations

import ctypes
import errno
import os
from contextlib import suppress
from pathlib import Path

_HERE, _NO_REPLACE, _EXCHANGE = -100, 1, 2
"""AT_FDCWD, RENAME_NOREPLACE and RENAME_EXCHANGE of Linux."""
_NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES})
"""What a filesystem without hard links says: exFAT, many of FUSE and SMB."""


def exchange(one: Path, other: Path) -> bool:
    """Let two paths change places; False where the system or the filesystem cannot."""
    return _renameat2(one, other, _EXCHANGE) == 0


def place(new: Path, target: Path) -> None:
    """Move a file or a folder to a path that is free: FileExistsError where something came to be there meanwhile.

    By `renameat2` where there is one; else a file by a hard link, which replaces nothing either; else onto an empty
    file or folder that was made exclusively, which only who replaces it at that very moment can lose.
    """
    code = _renameat2(new, target, _NO_REPLACE)
    if code == errno.EEXIST:
        raise FileExistsError(code, os.strerror(code), str(target))
    if code == 0 or (not new.is_dir() and _linked(new, target)):
        return
    if new.is_dir():
        os.mkdir(target)
    else:
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    try:
        os.rename(new, target)
    except OSError as error:
        with suppress(OSError):
            (os.rmdir if new.is_dir() else os.unlink)(target)
        if error.errno == errno.ENOTEMPTY:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
        raise


def _linked(new: Path, target: Path) -> bool:
    try:
        os.link(new, target)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return False
    return True


def _renameat2(one: Path, other: Path, how: int) -> int:
    """Return 0, or the number of the error; there is none of it outside Linux."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return errno.ENOSYS
    return 0 if rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), how) == 0 else ctypes.get_errno()
