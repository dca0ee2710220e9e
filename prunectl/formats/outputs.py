"""Where the output goes: whole or not at all, and nothing left behind."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from prunectl.errors import UsageError, WorkError
from prunectl.formats.base import ModelFile

PREFIX = ".prunectl-"
_LOCK = "lock"


def check_target(model: ModelFile, target: Path, *, is_forced: bool, is_in_place: bool) -> None:
    """Refuse a target that is there already, or that is the input, unless the user said so."""
    if is_same(model.path, target):
        if not is_in_place:
            raise UsageError(f"{target} is the input itself", hint="write elsewhere, or say --in-place")
    elif os.path.lexists(target) and not is_forced:
        raise UsageError(f"{target} exists", hint="write elsewhere, or replace it with --force")
    if not target.parent.is_dir():
        raise UsageError(f"{target.parent} is not a folder", hint=f"mkdir -p {target.parent}")


def is_same(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file."""
    return other.exists() and os.path.samefile(one, other)


def targets(model: ModelFile, target: Path) -> dict[Path, Path]:
    """Return where each file of a model goes, relative to the folder that it is written in."""
    if model.path.is_dir():
        return {file: Path(target.name) / file.relative_to(model.path) for file in model.files}
    if model.format == "shards":
        return {file: Path(target.name) / file.name for file in model.files}
    if model.format == "tf-checkpoint":
        old, new = model.path.name.removesuffix(".index"), target.name.removesuffix(".index")
        return {file: Path(new + file.name.removeprefix(old)) for file in model.files}
    return {
        file: Path(target.name) if file == model.path else file.relative_to(model.path.parent) for file in model.files
    }


@contextmanager
def replacing(target: Path, *, may_replace: bool) -> Generator[Path]:
    """Yield a scratch folder beside the target; what is in it at the end takes its place, if nothing fails."""
    with _scratch(target.parent) as folder:
        yield folder
        # That by which a model is opened comes last: until it is there, there is no model.
        for child in sorted(folder.iterdir(), key=lambda child: (child.name == target.name, child.suffix == ".index")):
            flush(child)
            _place(child, target.parent / child.name, folder.parent, may_replace=may_replace)
        _sync_folder(target.parent)


@contextmanager
def _scratch(parent: Path) -> Generator[Path]:
    # Beside the target, because a rename is atomic only within one filesystem.
    _clear_stale(parent)
    try:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    except OSError as error:
        raise WorkError(f"{parent} cannot be written to: {error.strerror}") from error
    lock = os.open(folder / _LOCK, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC)
    fcntl.flock(lock, fcntl.LOCK_EX)
    inside = folder / "new"
    inside.mkdir()
    try:
        yield inside
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _clear_stale(parent: Path) -> None:
    """Remove what a run that was killed has left; one that is alive holds its lock."""
    for folder in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):
            lock = os.open(folder / _LOCK, os.O_WRONLY | os.O_CLOEXEC | os.O_CREAT)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _place(new: Path, target: Path, scratch: Path, *, may_replace: bool) -> None:
    try:
        if may_replace:
            if target.is_dir():
                # A folder cannot take the place of one that is not empty.
                os.rename(target, scratch / "old")
            os.replace(new, target)
        elif new.is_dir():
            os.rename(new, target)
        else:
            os.link(new, target)  # which, unlike a rename, does not replace what came to be there meanwhile
    except OSError as error:
        raise WorkError(f"{target} cannot be written: {error.strerror}") from error


def flush(path: Path) -> None:
    """Wait until a file, or every file in a folder, is on the disk."""
    for file in [path] if path.is_file() else [child for child in path.rglob("*") if child.is_file()]:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _sync_folder(path: Path) -> None:
    with suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
