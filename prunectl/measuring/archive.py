"""A model as one stream of bytes: a file as it is, several as a tar that depends on nothing but their content."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from pathlib import Path

from prunectl.formats.base import ModelFile

_PIECE_BYTES = 1 << 20


def stream(model: ModelFile) -> Iterator[bytes]:
    """Yield the bytes that the size of a model is measured on."""
    if len(model.files) == 1 and not model.path.is_dir():
        yield from pieces(model.files[0])
    else:
        yield from tar(model.path if model.path.is_dir() else model.path.parent, model.files)


def sha256(model: ModelFile) -> str:
    """Return the hash of a model: of its file, or of the tar of its files."""
    return _hashed(stream(model))


def sha256_of(path: Path) -> str:
    """Return the hash of one file."""
    return _hashed(pieces(path))


def _hashed(content: Iterator[bytes]) -> str:
    digest = hashlib.sha256()
    for piece in content:
        digest.update(piece)
    return digest.hexdigest()


def pieces(path: Path) -> Iterator[bytes]:
    """Yield a file piece by piece."""
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            yield piece


def tar(root: Path, files: tuple[Path, ...]) -> Iterator[bytes]:
    """Yield a tar of files, sorted, without times, owners or modes of their own."""
    done = 0
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in files):
        info = tarfile.TarInfo(name)
        info.size = path.stat().st_size
        head = info.tobuf(tarfile.GNU_FORMAT)
        yield head
        yield from pieces(path)
        padding = bytes(-info.size % tarfile.BLOCKSIZE)
        yield padding
        done += len(head) + info.size + len(padding)
    end = 2 * tarfile.BLOCKSIZE
    yield bytes(end + -(done + end) % tarfile.RECORDSIZE)
