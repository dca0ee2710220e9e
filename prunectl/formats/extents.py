"""Flat runs of bytes in files, mapped or streamed."""

from __future__ import annotations

import errno
import io
import math
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from prunectl.errors import InputError, abbreviated, reading
from prunectl.formats.workers import check_stopped

BYTE = np.dtype(np.uint8)
BLOCK_BYTES = 1 << 20
"""Small enough to stay in a core's cache between reading and counting."""


@dataclass(frozen=True, slots=True)
class Extent:
    """A flat run of bytes in a file."""

    path: Path
    offset: int
    nbytes: int


class RemoteFile(Protocol):
    """A file on a server or in an object store, read in ranges."""

    url: str
    nbytes: int
    version: str
    """An ETag, a modification time or another mark that changes with the content."""

    def head(self, nbytes: int, whole: int = 0) -> bytes:
        """The first bytes; also sets the size and version. A server without ranges may send up to `whole` bytes."""

    def read(self, offset: int, nbytes: int) -> bytes:
        """A range of bytes."""


REMOTE: dict[Path, RemoteFile] = {}
"""Remote files by the path of a local file that holds their head only; all else is read from the server."""


def file_bytes(path: Path) -> int:
    """The size of a local or remote file."""
    return REMOTE[path].nbytes if path in REMOTE else path.stat().st_size


FileState = tuple[int, int | str]


def file_state(path: Path) -> FileState:
    """What tells whether a file has changed: its size, with its mtime, or the version of a remote file."""
    if path in REMOTE:
        return REMOTE[path].nbytes, REMOTE[path].version
    facts = os.stat(path)
    return facts.st_size, facts.st_mtime_ns


def file_states(paths: Iterable[Path], earlier: Mapping[Path, FileState] | None = None) -> dict[Path, FileState]:
    """The states of files; for a file in `earlier`, the state recorded there."""
    known = earlier or {}
    return {path: known[path] if path in known else file_state(path) for path in paths}


def _changed(path: Path) -> InputError:
    return InputError(
        f"{path} was changed while prunectl was reading it; nothing was written",
        hint="run the same command again once no other program writes to it",
    )


@contextmanager
def unchanged(states: Mapping[Path, FileState], refusal: Callable[[Path], InputError] = _changed) -> Generator[None]:
    """Raise an error if a file changed while the block ran: each pass over it would read other values.

    Any exception in the block, also one of a framework, may be a consequence, so that the change is reported instead.
    """
    try:
        yield
    except Exception as error:
        if path := _first_changed(states):
            raise refusal(path) from error
        raise
    if path := _first_changed(states):
        raise refusal(path)


def ignoring_mtime(states: Mapping[Path, FileState]) -> dict[Path, FileState]:
    """The same states, with the current mtime for each file that still has its recorded size."""
    now = {path: file_state(path) for path in states if path in REMOTE or path.exists()}
    return {path: now[path] if path in now and now[path][0] == state[0] else state for path, state in states.items()}


def _first_changed(states: Mapping[Path, FileState]) -> Path | None:
    for path, state in states.items():
        try:
            is_same = file_state(path) == state
        except OSError:
            is_same = False
        if not is_same:
            return path
    return None


class FileWindow(io.RawIOBase):
    """A part of a file as a readable file object."""

    def __init__(self, path: Path, begin: int, nbytes: int) -> None:
        super().__init__()
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._begin, self._nbytes, self._position = begin, nbytes, 0

    def readable(self) -> bool:
        """Whether it can be read: always."""
        return True

    def seekable(self) -> bool:
        """Whether it supports `seek`: always."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to an offset from the start, the current position or the end of the part."""
        start = (0, self._position, self._nbytes)[whence]
        if start + offset < 0:
            raise OSError(errno.EINVAL, "a position before the start")
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        """The current position."""
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, up to the end of the part."""
        want = max(min(len(buffer), self._nbytes - self._position), 0)
        got = os.preadv(self._fd, [memoryview(buffer)[:want]], self._begin + self._position)
        self._position += got
        return got

    def close(self) -> None:
        """Close the underlying file descriptor."""
        if not self.closed:
            os.close(self._fd)
        super().close()


def check_inside(path: Path, offset: int, nbytes: int, file_bytes: int, what: str) -> None:
    """Reject a run of bytes that is not wholly inside its file."""
    if offset < 0 or nbytes < 0 or offset + nbytes > file_bytes:
        raise InputError(
            f"{path} is truncated or damaged: {abbreviated(what)} should be at bytes {offset}..{offset + nbytes}, "
            f"but the file has {file_bytes}"
        )


def view(
    extent: Extent,
    *,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    start: int = 0,
    strides: tuple[int, ...] | None = None,
    big_endian: bool = False,
) -> NDArray[Any]:
    """The extent as a read-only array: memory-mapped, or read if it is remote."""
    if math.prod(shape) == 0 or extent.nbytes == 0:
        return np.zeros(shape, dtype)
    if extent.path in REMOTE:
        raw = np.frombuffer(REMOTE[extent.path].read(extent.offset, extent.nbytes), np.uint8)
    else:
        try:
            raw = np.memmap(extent.path, np.uint8, "r", extent.offset, (extent.nbytes,))
        except ValueError as error:
            # The file has become shorter since its tensors were located in it.
            raise _truncated(extent.path) from error
    return arrange(raw, dtype=dtype, shape=shape, start=start, strides=strides, big_endian=big_endian)


def arrange(
    raw: NDArray[np.uint8],
    *,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    start: int = 0,
    strides: tuple[int, ...] | None = None,
    big_endian: bool = False,
) -> NDArray[Any]:
    """View raw bytes as a read-only tensor; `start` and `strides` are counted in elements."""
    raw = raw[start * dtype.itemsize :]
    if big_endian:
        raw = _swapped(raw[: raw.size // dtype.itemsize * dtype.itemsize], dtype)
    if strides is None:
        array = raw[: math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
    else:
        elements = raw[: raw.size // dtype.itemsize * dtype.itemsize].view(dtype)
        array = as_strided(elements, shape, [step * dtype.itemsize for step in strides], writeable=False)
    array.flags.writeable = False
    return array


def unpack(raw: NDArray[np.uint8], dtype: np.dtype[Any], bits: int) -> NDArray[Any]:
    """Unpack elements of 2 or 4 bits to a byte each, from the lowest bits of a byte to the highest."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((raw[:, None] >> shifts) & np.uint8((1 << bits) - 1)).reshape(-1).view(dtype)


def _swapped(raw: NDArray[np.uint8], dtype: np.dtype[Any]) -> NDArray[np.uint8]:
    """Swap the byte order, on raw bytes because NumPy has no byte order for bfloat16."""
    width = dtype.itemsize // 2 if dtype.kind == "c" else dtype.itemsize
    return np.ascontiguousarray(raw.reshape(-1, width)[:, ::-1]).reshape(-1)


def raw_bytes(array: NDArray[Any], *, big_endian: bool = False) -> memoryview:
    """The bytes of an array as stored in a file, in C order."""
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return (_swapped(raw, array.dtype) if big_endian else raw).data


def file_chunks(path: Path) -> Iterator[bytes]:
    """Yield a file chunk by chunk."""
    if path in REMOTE:
        for offset in range(0, REMOTE[path].nbytes, BLOCK_BYTES):
            yield REMOTE[path].read(offset, min(BLOCK_BYTES, REMOTE[path].nbytes - offset))
        return
    with path.open("rb") as file:
        while chunk := file.read(BLOCK_BYTES):
            yield chunk


_SMALL_BYTES, _AHEAD_BYTES = 1 << 16, 1 << 18
_of_thread = threading.local()


class _ReadAhead:
    """A read-ahead buffer over a file: filled once a small run lies close behind the one before."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._fd = -1
        self._begin, self._data = 0, b""

    def read(self, extent: Extent) -> NDArray[np.uint8]:
        """The bytes of a small run, as a copy."""
        if extent.path != self._path:
            self.close()
            with reading(extent.path):
                self._fd = os.open(extent.path, os.O_RDONLY | os.O_CLOEXEC)
            self._path = extent.path
        offset = extent.offset - self._begin
        if not 0 <= offset <= offset + extent.nbytes <= len(self._data):
            is_near = 0 <= offset - len(self._data) < _SMALL_BYTES or 0 <= offset < len(self._data)
            with reading(extent.path):
                self._data = os.pread(self._fd, _AHEAD_BYTES if is_near else extent.nbytes, extent.offset)
            self._begin, offset = extent.offset, 0
            if len(self._data) < extent.nbytes:
                raise _truncated(extent.path)
        return np.frombuffer(self._data, np.uint8, extent.nbytes, offset).copy()

    def close(self) -> None:
        if self._path is not None:
            os.close(self._fd)
        self._path, self._data = None, b""


@contextmanager
def read_ahead() -> Generator[None]:
    """Let `blocks` read ahead for small extents in this thread: to open and read each one takes most of the time.

    The buffer may miss data that is written to the same files meanwhile.
    """
    outer = getattr(_of_thread, "window", None)
    window = _of_thread.window = outer or _ReadAhead()
    try:
        yield
    finally:
        _of_thread.window = outer
        if outer is None:
            window.close()


def _truncated(path: Path) -> InputError:
    return InputError(f"{path} was truncated while prunectl was reading it")


def blocks(extent: Extent, dtype: np.dtype[Any]) -> Iterator[NDArray[Any]]:
    """Yield the extent in pieces of up to BLOCK_BYTES, which may share one buffer: each is valid until the next."""
    if extent.path in REMOTE:
        for done in range(0, extent.nbytes, BLOCK_BYTES):
            check_stopped()
            piece = REMOTE[extent.path].read(extent.offset + done, min(BLOCK_BYTES, extent.nbytes - done))
            # A copy, because callers may write to the block.
            yield np.frombuffer(piece, np.uint8).copy().view(dtype)
        return
    window: _ReadAhead | None = getattr(_of_thread, "window", None)
    if window is not None and 0 < extent.nbytes <= _SMALL_BYTES:
        check_stopped()
        yield window.read(extent).view(dtype)
        return
    buffer = np.empty(min(BLOCK_BYTES, extent.nbytes), np.uint8)
    fd = os.open(extent.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        done = 0
        while done < extent.nbytes:
            check_stopped()
            want = min(buffer.size, extent.nbytes - done)
            with reading(extent.path):
                got = os.preadv(fd, [buffer[:want].data], extent.offset + done)
            if got != want:
                raise _truncated(extent.path)
            yield buffer[:got].view(dtype)
            done += got
    finally:
        os.close(fd)


def mmap_file(path: Path) -> memoryview:
    """The bytes of a file, memory-mapped."""
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{path} is truncated or damaged: it is empty")
        return np.memmap(path, np.uint8, "r").data
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
