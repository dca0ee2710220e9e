"""Atomic writes: an output appears whole or not at all, and a failed run leaves no files behind."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from shlex import quote
from threading import Event

from prunectl.errors import FILE_LIMIT, NO_ROOM, UsageError, WorkError, is_of_output
from prunectl.formats import scratch
from prunectl.formats.base import ModelFile
from prunectl.formats.detect import PIPELINE_INDEX, parts_without_index
from prunectl.formats.registry import WEIGHT_FILES
from prunectl.formats.workers import check_stopped

_AT_FDCWD, _NO_REPLACE, _EXCHANGE = -100, 1, 2
"""AT_FDCWD, RENAME_NOREPLACE and RENAME_EXCHANGE of Linux."""
_NO_LINK_ERRNOS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES})
"""Errors of filesystems without hard links: exFAT, many of FUSE and SMB."""


def swap_atomically(one: Path, other: Path) -> bool:
    """Exchange two paths; False where the system or the filesystem does not support it."""
    return _renameat2(one, other, _EXCHANGE) == 0


def move_if_free(new: Path, target: Path) -> None:
    """Move a file or a folder to a free path; FileExistsError if another process has created it meanwhile.

    Uses `renameat2` where available, else (for a file) a hard link, which never replaces anything either. Otherwise it
    creates an empty file or folder exclusively and renames over it: only a replacement of that placeholder can be lost.
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
    except OSError as error:
        if error.errno not in _NO_LINK_ERRNOS:
            raise
        return False
    return True


def _renameat2(one: Path, other: Path, how: int) -> int:
    """Return 0 or the errno; ENOSYS outside Linux, which alone has this call."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return errno.ENOSYS
    return 0 if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), how) == 0 else ctypes.get_errno()


_MODEL_FOLDERS = ("saved_model.pb", PIPELINE_INDEX, *WEIGHT_FILES)
_INDEX = ".index.json"
_SHARD_TAIL = re.compile(r"-\d+-of-\d+\.\w+$")


def check_target(
    model: ModelFile, target: Path, *, is_forced: bool, is_in_place: bool, is_one_file: bool = False
) -> None:
    """Refuse a target that exists already or is the input, unless the user allowed it (`--force`, `--in-place`).

    A single output file may lie in the folder of the SavedModel or pipeline that it is made from.
    """
    if is_in_place:
        check_folder(model.path.resolve().parent)
        return
    if not target.name:
        raise UsageError(f"{target} is not a file name", hint=f"write {target / model.path.name}")
    if is_same(model.path, target):
        raise UsageError(f"{target} is the input itself", hint="choose another --output, or use --in-place")
    check_parent(target)
    _check_apart(model, target, is_one_file=is_one_file)
    for path in dict.fromkeys(_moved_path(name, target) for name in planned_files(model, target)):
        check_replaceable(path, hint="-o - writes to standard output")
        if any(is_same(file, path) for file in model.files):
            raise UsageError(f"{path} is part of the input", hint="write to another folder")
        if os.path.lexists(path) and not is_forced:
            raise UsageError(f"{path} exists", hint="choose another --output, or replace it with --force")
        is_model = any((path / name).is_file() for name in _MODEL_FOLDERS)
        if path.is_dir() and not is_model and not _is_made_of_parts(path):
            raise UsageError(f"{path} is a folder without a model: prunectl does not replace it")
    check_folder(target.parent)


def _is_made_of_parts(folder: Path) -> bool:
    """Whether a folder without an index holds only parts of a pipeline with weights, and training state."""
    parts = parts_without_index(folder)
    if not parts:
        return False
    from prunectl.formats.folder import is_training_state  # noqa: PLC0415 - most models are files

    return all(
        any((path / weights).is_file() for weights in WEIGHT_FILES) if path.name in parts else is_training_state(path)
        for path in folder.iterdir()
    )


def _check_apart(model: ModelFile, target: Path, *, is_one_file: bool) -> None:
    """Refuse a target folder that contains the input, or lies inside it."""
    folder = model.folder or (model.path if model.path.is_dir() else None)
    if folder is None:
        return
    source, destination = folder.resolve(), target.resolve()
    hint = "choose another --output, or use --in-place"
    if source == destination:
        raise UsageError(f"{target} is the input itself", hint=hint)
    if destination.is_relative_to(source) and not is_one_file:
        raise UsageError(f"{target} lies in the input {folder}", hint=hint)
    if source.is_relative_to(destination):
        raise UsageError(f"{target} holds the input {folder}, and would be replaced as a whole", hint=hint)


def planned_files(model: ModelFile, target: Path) -> dict[Path, Path]:
    """The files of the output, relative to the target's parent folder, each with the input file that it comes from.

    A model that the user named by its folder becomes a folder, with the files beside its weights.
    """
    if model.folder is None:
        return {name: source for source, name in targets(model, target).items()}
    from prunectl.formats.folder import companions  # noqa: PLC0415 - most models are files

    weights = {name: source for source, name in targets(model, target / model.path.name).items()}
    beside = {path: model.folder / path for path in companions(model).copied}
    return {Path(target.name) / name: source for name, source in {**beside, **weights}.items()}


def _moved_path(name: Path, target: Path) -> Path:
    """The path that is moved into place as a whole for this file: the file itself, or the model's folder."""
    return target if name.parts[0] == target.name else target.parent / name


def is_same(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file."""
    return other.exists() and os.path.samefile(one, other)


def targets(model: ModelFile, target: Path) -> dict[Path, Path]:
    """The output path of each file of a model, relative to the target's parent folder.

    Data files beside a model are named after the output, so that two outputs in one folder never share them: those of
    `out.onnx` are `out.onnx.data` and `out.onnx.1.data`; the shards of `out.safetensors.index.json` are
    `out-00001-of-00002.safetensors` and so on. In place, and in a folder of its own, every file keeps its name.
    """
    if model.path.is_dir():
        return {file: Path(target.name) / file.relative_to(model.path) for file in model.files}
    if model.format == "shards" and not target.name.endswith(_INDEX):
        return {file: Path(target.name) / file.name for file in model.files}
    if model.format == "tf-checkpoint":
        old, new = model.path.name.removesuffix(".index"), target.name.removesuffix(".index")
        return {file: Path(new + file.name.removeprefix(old)) for file in model.files}
    if is_same(model.path, target):
        own = {file: file.relative_to(model.path.parent) for file in model.files}
    else:
        beside = tuple(dict.fromkeys(file for file in model.files if file != model.path))
        if model.format == "shards":
            scratch.check_is_text(target.name)
        name = _shard_names if model.format == "shards" else _data_names
        own = dict(zip(beside, name(beside, target.name), strict=True))
    return {**own, model.path: Path(target.name)}


def _data_names(files: Sequence[Path], name: str) -> list[Path]:
    return [Path(f"{name}.{number}.data" if number else f"{name}.data") for number in range(len(files))]


def _shard_names(shards: Sequence[Path], index: str) -> list[Path]:
    """Names for shards; they keep their numbers where all of them have a distinct one."""
    stem = index.removesuffix(_INDEX).removesuffix(shards[0].suffix if shards else "")
    tails = [match.group() for shard in shards if (match := _SHARD_TAIL.search(shard.name))]
    if len(set(tails)) < len(shards):
        tails = [f"-{number:05}-of-{len(shards):05}{shard.suffix}" for number, shard in enumerate(shards, 1)]
    return [Path(f"{stem}{tail}") for tail in tails]


def check_parent(path: Path) -> None:
    """Refuse a path whose folder does not exist."""
    if path.parent.is_dir():
        return
    in_the_way = next((folder for folder in path.parents if os.path.lexists(folder)), None)
    if in_the_way is None or in_the_way.is_dir():
        raise UsageError(f"{path.parent} is not a folder", hint=f"mkdir -p {quote(str(path.parent))}")
    raise UsageError(f"{path} cannot be created: {in_the_way} is not a folder", hint="choose a path in a folder")


def is_device(path: Path) -> bool:
    """Whether a path is a device, a pipe, a socket, or an entry of /dev itself, or of /proc at any depth.

    /dev/stdout is a link, which may lead to a plain file. If prunectl replaced the link, no program would have it.
    """
    folder = path.parent.resolve()
    is_of_system = folder == Path("/dev") or folder.is_relative_to("/proc")
    return path.exists() and (is_of_system or not (path.is_file() or path.is_dir()))


def check_replaceable(path: Path, hint: str = "name a file") -> None:
    """Refuse to replace a device or a pipe: its reader would wait in vain for data."""
    if is_device(path):
        raise UsageError(f"{path} is a device or a pipe: prunectl does not replace it", hint=hint)


def check_folder(folder: Path) -> None:
    """Refuse a folder that is not writable, before any work begins."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise WorkError(f"{folder} cannot be written to: {error.strerror}; nothing was written") from error


def check_beside(path: Path) -> None:
    """Refuse a path where a secondary output, such as a report, could not be written once the work is done."""
    if str(path) == "-":
        raise UsageError("only the model itself can be written to standard output", hint="name a file instead of -")
    check_parent(path)
    check_replaceable(path)
    check_folder(path.parent)


def write_text(target: Path, text: str, *, is_forced: bool) -> None:
    """Write a text file atomically; it replaces an existing file only if `is_forced`."""
    check_parent(target)
    check_replaceable(target)
    if target.is_dir() or (os.path.lexists(target) and not is_forced):
        raise UsageError(f"{target} exists", hint="choose another --output, or replace it with --force")
    with atomic_replace(target, may_replace=is_forced) as folder:
        (folder / target.name).write_text(text, encoding="utf-8")


@contextmanager
def atomic_replace(target: Path, *, may_replace: bool, model: ModelFile | None = None) -> Generator[Path]:
    """Yield a scratch folder beside the target; if nothing fails, its files are then moved into place.

    An output made from a model gets the permissions of that model, or of the file that it replaces.
    """
    # Without `model`, the file is a report about a model, which may have been written already.
    unwritten = "nothing was written" if model is not None else f"{target.name} was not written"
    with _staging_dir(target.parent, unwritten) as folder:
        yield folder
        moves = _move_order(folder, target, model)
        for new, _ in moves:
            flush(new)
        origins = {} if model is None else planned_files(model, target)
        scratch.set_modes(folder, target.parent, origins, model)
        # Signals are deferred, so that none can interrupt between two files of one model.
        with scratch.deferred_signals():
            _move_all(moves, folder.parent, may_replace=may_replace)
        with suppress(OSError), _opened(target.parent) as fd:
            os.fsync(fd)


def _move_order(folder: Path, target: Path, model: ModelFile | None) -> list[tuple[Path, Path]]:
    """The moves from the scratch folder; the file by which the model is opened comes last, to complete the model."""
    whole = folder / target.name
    if model is not None and model.has_neighbours and is_same(model.path, target):
        # In place, only the files with weights are replaced: the folder also holds files that are not the model's.
        paths = {tensor.storage.extent.path for tensor in model.tensors if tensor.storage.extent is not None}
        names = sorted(path.relative_to(model.path) for path in paths)
        return [(whole / name, target / name) for name in names]
    news = [whole] if whole.is_dir() else [child for child in folder.rglob("*") if child.is_file()]
    order = sorted(news, key=lambda new: (new == whole, new.suffix in {".index", ".json"}, new))
    return [(new, target.parent / new.relative_to(folder)) for new in order]


@contextmanager
def _staging_dir(parent: Path, unwritten: str) -> Generator[Path]:
    # Beside the target, because a rename is atomic only within one filesystem.
    scratch.clear_stale(parent, scratch.HIDDEN)
    staging = scratch.LockedFolder()
    try:
        staging.take(parent, scratch.HIDDEN)
        yield staging.inside
    except OSError as error:
        if error.errno == errno.EFBIG:
            message = f"{parent} takes no file as large as the result: {error.strerror}; {unwritten}"
            raise WorkError(message, hint=FILE_LIMIT) from error
        if error.errno in NO_ROOM:
            raise WorkError(f"{parent} has no space for the result: {error.strerror}; {unwritten}") from error
        # An error without a file name comes from a write; one about another file is not about the output.
        if error.errno is None or not (error.filename is None or is_of_output(error)):
            raise
        raise WorkError(f"{parent} cannot be written to: {error.strerror}; {unwritten}") from error
    finally:
        staging.release()


_guard: ContextVar[Callable[[Path], None] | None] = ContextVar("guard", default=None)


@contextmanager
def guarded(check: Callable[[Path], None]) -> Generator[None]:
    """Within the block, check again that each existing path may be replaced, right before it is."""
    token = _guard.set(check)
    try:
        yield
    finally:
        _guard.reset(token)


def _move_all(moves: list[tuple[Path, Path]], folder: Path, *, may_replace: bool) -> None:
    made: dict[Path, os.stat_result] = {}
    try:
        check = _guard.get()
        if check is not None:
            for path in (path for _, path in moves if os.path.lexists(path)):
                check(path)
        for new, path in moves:
            made[path] = os.lstat(new)
            _move_into_place(new, path, folder, may_replace=may_replace)
    except BaseException:
        # A replaced file cannot be restored. Where nothing was replaced, the files moved so far are removed again.
        for path, facts in made.items() if not may_replace else ():
            with suppress(OSError):
                if os.path.samestat(os.lstat(path), facts):
                    path.unlink()
        raise


def _move_into_place(new: Path, target: Path, scratch_folder: Path, *, may_replace: bool) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not may_replace:
            move_if_free(new, target)
        elif not target.is_dir() or target.is_symlink():
            os.replace(new, target)
        elif not swap_atomically(new, target):
            # A rename cannot replace a folder that is not empty.
            old = scratch_folder / scratch.OLD
            os.rename(target, old)
            try:
                os.rename(new, target)
            except BaseException:
                os.rename(old, target)
                raise
    except FileExistsError as error:
        raise WorkError(
            f"{target} was created while prunectl was running", hint="another run may have written it"
        ) from error
    except OSError as error:
        raise WorkError(f"{target} cannot be written: {error.strerror}") from error


_WRITE, _WAIT = 2, 4
"""SYNC_FILE_RANGE_WRITE and SYNC_FILE_RANGE_WAIT_AFTER of Linux."""
_FLUSH_BYTES = 16 << 20
"""Bytes to wait for in one call: an interrupted run waits for no more than these."""
_PAUSE_SECONDS = 0.05


def flush(path: Path) -> None:
    """Wait until a file, or every file in a folder, is on the disk (fsync)."""
    for file in _files(path):
        with _opened(file) as fd:
            _sync_range(fd, _WRITE)
            _sync_range(fd, _WAIT)
            os.fsync(fd)


def flush_meanwhile(folder: Path, is_written: Event) -> None:
    """Start writeback of the files in a folder while they are being written, until `is_written` is set."""
    begun: dict[Path, int] = {}
    while not is_written.wait(_PAUSE_SECONDS):
        check_stopped()
        # Scratch files may be deleted before their turn comes.
        with suppress(FileNotFoundError):
            for file in _files(folder):
                changed = file.stat().st_mtime_ns
                if begun.get(file) != changed:
                    with _opened(file) as fd:
                        _sync_range(fd, _WRITE)
                    begun[file] = changed


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [child for child in path.rglob("*") if child.is_file()]


def _sync_range(fd: int, how: int) -> None:
    """Start writeback of a file's dirty pages, or wait for it (`sync_file_range`), where the system has this call.

    It works in pieces, because a single call for the whole file could not be interrupted. Errors other than those of a
    full or broken disk are left to fsync.
    """
    sync = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)
    if sync is None:
        return
    for begin in range(0, os.fstat(fd).st_size, _FLUSH_BYTES):
        check_stopped()
        if sync(fd, ctypes.c_int64(begin), ctypes.c_int64(_FLUSH_BYTES), how) != 0:
            code = ctypes.get_errno()
            if code in NO_ROOM | {errno.EIO}:
                raise OSError(code, os.strerror(code))
            return


@contextmanager
def _opened(path: Path) -> Generator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
