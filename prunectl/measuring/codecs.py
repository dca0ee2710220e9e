"""How small a general compressor makes a model, and which compressor that was."""

from __future__ import annotations

import hashlib
import lzma
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from prunectl.errors import UsageError
from prunectl.formats.optional import require


class CodecName(StrEnum):
    """The compressors to measure with."""

    GZIP = "gzip"
    ZSTD = "zstd"
    XZ = "xz"
    NONE = "none"


class Compressor(Protocol):
    """What zlib, lzma and zstandard have in common."""

    def compress(self, data: bytes, /) -> bytes:
        """Return what is ready of the output."""

    def flush(self) -> bytes:
        """Return the rest of it."""


@dataclass(frozen=True, slots=True)
class Codec:
    """A compressor, its level and its library: together they decide the size to the byte."""

    name: CodecName
    level: int
    library: str


@dataclass(frozen=True, slots=True)
class Compressed:
    """What came of a stream of bytes."""

    nbytes: int
    sha256: str
    """Of the bytes before they were compressed."""


class _Nothing:
    """The compressor that does not."""

    def compress(self, data: bytes, /) -> bytes:
        return data

    def flush(self) -> bytes:
        return b""


def _gzip(level: int) -> Compressor:
    # Window bits of 31 put the deflate stream in a gzip envelope, without a name and with time 0.
    return zlib.compressobj(level, zlib.DEFLATED, zlib.MAX_WBITS | 16)


def _xz(level: int) -> Compressor:
    return lzma.LZMACompressor(preset=level)


def _zstd(level: int) -> Compressor:
    compressor: Compressor = require("zstandard", extra="zstd").ZstdCompressor(level=level).compressobj()
    return compressor


_MAKERS: dict[CodecName, tuple[Callable[[int], Compressor], int, int]] = {
    CodecName.GZIP: (_gzip, 6, 9),
    CodecName.ZSTD: (_zstd, 3, 22),
    CodecName.XZ: (_xz, 6, 9),
    CodecName.NONE: (lambda _: _Nothing(), 0, 0),
}
"""How a compressor is made, its usual level, and its highest."""


def pick(name: CodecName, level: int | None) -> Codec:
    """Return the codec that was asked for, with the version of the library behind it."""
    _, usual, highest = _MAKERS[name]
    if level is not None and not min(1, highest) <= level <= highest:
        raise UsageError(f"{name} has levels {min(1, highest)} to {highest}, not {level}")
    return Codec(name, usual if level is None else level, _library(name))


def compress(pieces: Iterable[bytes], codec: Codec, tick: Callable[[int], None] = lambda _: None) -> Compressed:
    """Return how many bytes a codec leaves of a stream, keeping none of them."""
    compressor = _MAKERS[codec.name][0](codec.level)
    digest = hashlib.sha256()
    nbytes = 0
    for piece in pieces:
        digest.update(piece)
        nbytes += len(compressor.compress(piece))
        tick(len(piece))
    return Compressed(nbytes + len(compressor.flush()), digest.hexdigest())


def _library(name: CodecName) -> str:
    if name is CodecName.GZIP:
        return f"zlib {zlib.ZLIB_RUNTIME_VERSION}"
    if name is CodecName.ZSTD:
        return f"zstandard {require('zstandard', extra='zstd').__version__}"
    return "liblzma" if name is CodecName.XZ else ""
