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
    """A file that is elsewhere, read in ranges."""

    url: str
    nbytes: int
    version: str
    """By what one state of it is told from another."""

    def head(self, nbytes: int, whole: int = 0) -> bytes:
        """The first bytes, and with them its size; all up to so many where no range is to be had."""

    def read(self, offset: int, nbytes: int) -> bytes:
        """A range of bytes."""


REMOTE: dict[Path, RemoteFile] = {}
"""Files of which only the head is here, by the path of that: all else is read where they are."""


def file_bytes(path: Path) -> int:
    """The size of a file, wherever it is."""
    return REMOTE[path].nbytes if path in REMOTE else path.stat().st_size


FileState = tuple[int, int | str]


def file_state(path: Path) -> FileState:
    """By what a file is known again: its size, and the time of its last change, or what a store calls this state."""
    if path in REMOTE:
        return REMOTE[path].nbytes, REMOTE[path].version
    facts = os.stat(path)
    return facts.st_size, facts.st_mtime_ns


def file_states(paths: Iterable[Path], earlier: Mapping[Path, FileState] | None = None) -> dict[Path, FileState]:
    """By what files are known again: of those that were looked at earlier, what they were then."""
    known = earlier or {}
    return {path: known[path] if path in known else file_state(path) for path in paths}


def _changed(path: Path) -> InputError:
    return InputError(
        f"{path} was changed while prunectl was reading it; nothing was written",
        hint="run the same command again when nobody writes to it any more",
    )


@contextmanager
def unchanged(states: Mapping[Path, FileState], refusal: Callable[[Path], InputError] = _changed) -> Generator[None]:
    """Refuse what is made of files that are no longer as they were: each pass would see other numbers.

    Whatever fails meanwhile may come of that, also in a framework: then the change is what is said.
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
    """The same states where a file of the size that it had is taken for the same."""
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
    """A part of a file, as if it were one."""

    def __init__(self, path: Path, begin: int, nbytes: int) -> None:
        super().__init__()
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._begin, self._nbytes, self._position = begin, nbytes, 0

    def readable(self) -> bool:
        """Whether it can be read."""
        return True

    def seekable(self) -> bool:
        """Whether any place in it can be read."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place, counted from the start, the current place or the end of the part."""
        start = (0, self._position, self._nbytes)[whence]
        if start + offset < 0:
            raise OSError(errno.EINVAL, "a place before the start")
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        """The current place."""
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read what fits, up to the end of the part."""
        want = max(min(len(buffer), self._nbytes - self._position), 0)
        got = os.preadv(self._fd, [memoryview(buffer)[:want]], self._begin + self._position)
        self._position += got
        return got

    def close(self) -> None:
        """Close the file behind it."""
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
    """The extent as a read-only array, mapped into memory rather than read."""
    if math.prod(shape) == 0 or extent.nbytes == 0:
        return np.zeros(shape, dtype)
    if extent.path in REMOTE:
        raw = np.frombuffer(REMOTE[extent.path].read(extent.offset, extent.nbytes), np.uint8)
    else:
        try:
            raw = np.memmap(extent.path, np.uint8, "r", extent.offset, (extent.nbytes,))
        except ValueError as error:
            # The file is shorter than it was when its tensors were placed in it.
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
    """See raw bytes as a tensor, read-only."""
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
    """Elements of 2 or 4 bits as a byte each, the lowest bits of a byte first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((raw[:, None] >> shifts) & np.uint8((1 << bits) - 1)).reshape(-1).view(dtype)


def _swapped(raw: NDArray[np.uint8], dtype: np.dtype[Any]) -> NDArray[np.uint8]:
    """Numbers in the other order of bytes: as plain bytes, which also serves bfloat16, that knows no byte order."""
    width = dtype.itemsize // 2 if dtype.kind == "c" else dtype.itemsize
    return np.ascontiguousarray(raw.reshape(-1, width)[:, ::-1]).reshape(-1)


def raw_bytes(array: NDArray[Any], *, big_endian: bool = False) -> memoryview:
    """An array as the bytes that a file has of it, in C order."""
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


class _Window:
    """A part of a file that is read ahead, once a small run lies right behind the one before."""

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
    """Have `blocks` read small runs of this thread together: to open and to read each of many takes most of the time.

    What is written to the same files meanwhile may be missed.
    """
    outer = getattr(_of_thread, "window", None)
    window = _of_thread.window = outer or _Window()
    try:
        yield
    finally:
        _of_thread.window = outer
        if outer is None:
            window.close()


def _truncated(path: Path) -> InputError:
    return InputError(f"{path} was truncated while prunectl was reading it")


def blocks(extent: Extent, dtype: np.dtype[Any]) -> Iterator[NDArray[Any]]:
    """Yield the extent piece by piece, each valid until the next: memory stays one block."""
    if extent.path in REMOTE:
        for done in range(0, extent.nbytes, BLOCK_BYTES):
            check_stopped()
            piece = REMOTE[extent.path].read(extent.offset + done, min(BLOCK_BYTES, extent.nbytes - done))
            # As a copy, which may be written to.
            yield np.frombuffer(piece, np.uint8).copy().view(dtype)
        return
    window: _Window | None = getattr(_of_thread, "window", None)
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
    """The bytes of a file without reading them."""
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{path} is truncated or damaged: it is empty")
        return np.memmap(path, np.uint8, "r").data
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
