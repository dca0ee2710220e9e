"""Who may read a result: those who may read what it was made from, or what it replaces."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from functools import reduce
from operator import and_
from pathlib import Path

from prunectl.formats.base import ModelFile

_BITS = 0o777
_READ_WRITE = 0o666


def give(folder: Path, parent: Path, origins: Mapping[Path, Path], model: ModelFile | None) -> None:
    """Give everything in a folder, which goes to a parent, the mode that it is to have there.

    As `cp` does: a new file gets the mode of its origin without what the umask takes; one that replaces another gets
    the mode and, as far as possible, the owner of that. What has no origin of its own (another format, code beside the
    weights) may be read by those who may read all of the model.
    """
    # What the umask, or the access list of the parent, left of a folder that was made with all permissions.
    allowed = stat.S_IMODE(folder.stat().st_mode) & _BITS
    modes = {name: _mode(source) for name, source in origins.items()}
    least = None if model is None else reduce(and_, map(_mode, model.files), _READ_WRITE)
    if model is not None and model.path.is_dir():
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
    """Return what is known of a file or folder that is there; nothing of a link, whose own mode says nothing."""
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
