"""Sizes of a model (raw, packed, compressed), limits on them, and sentences on the limits."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from prunectl.analysis.stats import ModelStats, SizeStats, Tick, measure_stats
from prunectl.analysis.tensor_io import ProgressFactory, no_progress
from prunectl.errors import UsageError, abbreviated
from prunectl.formats.base import ModelFile
from prunectl.formats.extents import file_bytes, file_chunks
from prunectl.formats.registry import by_name, load
from prunectl.formats.safe_json import require
from prunectl.formats.scratch import temporary_folder
from prunectl.formats.workers import Made, Workers, check_stopped, workers
from prunectl.units import Units, count, duration, nbytes, percent, printable


def iter_model_bytes(model: ModelFile) -> Iterator[bytes]:
    """Yield the bytes that are compressed and hashed: those of the file, or of a tar of several files."""
    if len(model.files) == 1 and not model.path.is_dir():
        yield from file_chunks(model.files[0])
    else:
        yield from iter_tar(model.path if model.path.is_dir() else model.path.parent, model.files)


def sha256(model: ModelFile) -> str:
    """The hash of a model's file, or of the tar of its files."""
    return _hashed(iter_model_bytes(model))


def sha256_of(path: Path) -> str:
    """The hash of one file."""
    return _hashed(file_chunks(path))


def _hashed(content: Iterator[bytes]) -> str:
    import hashlib  # noqa: PLC0415 - only needed for hashes

    digest = hashlib.sha256()
    for piece in content:
        digest.update(piece)
    return digest.hexdigest()


def iter_tar(root: Path, files: tuple[Path, ...]) -> Iterator[bytes]:
    """Yield a reproducible tar of files: sorted, without their times, owners or modes."""
    import tarfile  # noqa: PLC0415 - most models are a single file

    done = 0
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in files):
        info = tarfile.TarInfo(name)
        info.size = file_bytes(path)
        head = info.tobuf(tarfile.GNU_FORMAT)
        yield head
        yield from file_chunks(path)
        padding = bytes(-info.size % tarfile.BLOCKSIZE)
        yield padding
        done += len(head) + info.size + len(padding)
    end = 2 * tarfile.BLOCKSIZE
    yield bytes(end + -(done + end) % tarfile.RECORDSIZE)


class CodecName(StrEnum):
    """The compressors to measure with."""

    GZIP = "gzip"
    ZSTD = "zstd"
    XZ = "xz"
    NONE = "none"


class Compressor(Protocol):
    """Common interface of the compressors of zlib, lzma and zstandard."""

    def compress(self, data: bytes, /) -> bytes:
        """Take input, and return the output that is ready."""

    def flush(self) -> bytes:
        """The rest of the output."""


@dataclass(frozen=True, slots=True)
class Codec:
    """A compressor, its level and its library: together they decide the size to the byte."""

    name: CodecName
    level: int
    library: str


@dataclass(frozen=True, slots=True)
class Compressed:
    """Compressed size and hash of a stream of bytes."""

    nbytes: int
    sha256: str
    """Hash of the bytes before compression."""


class _Identity:
    """A compressor that returns its input."""

    def compress(self, data: bytes, /) -> bytes:
        return data

    def flush(self) -> bytes:
        return b""


def _gzip(level: int) -> Compressor:
    # Window bits of 31 put the deflate stream in a gzip envelope, without a name and with time 0.
    return zlib.compressobj(level, zlib.DEFLATED, zlib.MAX_WBITS | 16)


def _xz(level: int) -> Compressor:
    import lzma  # noqa: PLC0415 - gzip is used most

    return lzma.LZMACompressor(preset=level)


def _zstd(level: int) -> Compressor:
    compressor: Compressor = require("zstandard", extra="zstd").ZstdCompressor(level=level).compressobj()
    return compressor


_MAKERS: dict[CodecName, tuple[Callable[[int], Compressor], int, int]] = {
    CodecName.GZIP: (_gzip, 6, 9),
    CodecName.ZSTD: (_zstd, 3, 22),
    CodecName.XZ: (_xz, 6, 9),
    CodecName.NONE: (lambda _: _Identity(), 0, 0),
}
"""Factory of each compressor, its default level, and its highest level."""


def get_codec(name: CodecName, level: int | None) -> Codec:
    """A codec by its name, with the version of the library behind it."""
    _, usual, highest = _MAKERS[name]
    if level is not None and not min(1, highest) <= level <= highest:
        raise UsageError(f"--level must be from {min(1, highest)} to {highest} for {name}, not {level}")
    return Codec(name, usual if level is None else level, _library(name))


def compress(pieces: Iterable[bytes], codec: Codec, tick: Tick = lambda _: None) -> Compressed:
    """Compress a stream only to learn its compressed size and its hash."""
    import hashlib  # noqa: PLC0415 - see above

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


_SMALL_BYTES = 1 << 20
_PASSES = 3
"""Passes over the bytes of a model: to count zeros, to compress and to pack."""


def measure(
    model: ModelFile, codec: Codec, meter: ProgressFactory = no_progress, known: ModelStats | None = None
) -> ModelStats:
    """Statistics with every size, compressing and packing in parallel; `known` statistics are not measured again."""
    total = model.nbytes * (_PASSES if known is None else _PASSES - 1)
    # A small model takes less time than starting threads.
    threads: AbstractContextManager[Workers | None] = nullcontext() if model.nbytes <= _SMALL_BYTES else workers(2)
    with threads as pool, meter(f"measuring {model.path.name}", total) as bar:

        def checked_tick(nbytes: int) -> None:
            check_stopped()
            bar.advance(nbytes)

        def start(work: Callable[..., Made], *arguments: Any) -> Callable[[], Made]:
            return partial(work, *arguments) if pool is None else pool.submit(work, *arguments).result

        compressing = start(compress, iter_model_bytes(model), codec, checked_tick)
        packing = start(packed_bytes, model, checked_tick)
        stats = measure_stats(model, model.tensors, tick=checked_tick) if known is None else known
        compressed, packed = compressing(), packing()
    sizes = SizeStats(raw=stats.bytes.raw, packed=packed, compressed=compressed.nbytes)
    return replace(stats, bytes=sizes, sha256=compressed.sha256)


def packed_bytes(model: ModelFile, tick: Tick) -> int:
    """The size with the container's own compression, measured by packing into a scratch file."""
    row = by_name(model.format)
    if not row.packer:
        return model.nbytes
    with temporary_folder() as scratch:
        target = scratch / model.path.name
        load(row.packer)(model, target, tick)
        # Files beside the model, such as weights of ONNX, are not packed.
        return model.nbytes - max(model.path.stat().st_size - target.stat().st_size, 0)


SENTENCES_ONLY = {"sentences only": True}
"""Metadata of dataclass fields that are used for sentences and left out of JSON."""


@dataclass(frozen=True, slots=True)
class LimitCheck:
    """A limit, and the measured value that is compared with it."""

    id: str
    metric: str
    limit: float
    """An integer if it counts bytes, a fraction if it is a share."""
    actual: float
    ok: bool
    model: str
    level: str = "error"
    codec: CodecName = field(default=CodecName.GZIP, kw_only=True, metadata=SENTENCES_ONLY)
    """Codec of the compressed size."""
    is_share: bool = field(default=True, kw_only=True, metadata=SENTENCES_ONLY)
    """Whether a value that is not in bytes is a share; otherwise it is a plain number, such as a loss."""


@dataclass(frozen=True, slots=True)
class SizeLimits:
    """Limits for a model; None means no limit."""

    max_raw: int | None = None
    max_packed: int | None = None
    max_compressed: int | None = None
    min_sparsity: float | None = None
    baseline: ModelStats | None = None
    max_growth_bytes: int | None = None
    """Growth of the compressed size over the baseline's, in bytes."""
    max_growth_ratio: float | None = None
    """Growth of the compressed size, as a share of the baseline's."""
    codec: CodecName = CodecName.GZIP


def check_limits(stats: ModelStats, limits: SizeLimits) -> tuple[LimitCheck, ...]:
    """The checks of all limits that are set."""
    sizes = stats.bytes
    checks = [
        _check_max(stats, "max-raw", "bytes.raw", limits.max_raw, sizes.raw),
        _check_max(stats, "max-packed", "bytes.packed", limits.max_packed, sizes.packed),
        _check_max(stats, "max-gzip", "bytes.compressed", limits.max_compressed, sizes.compressed),
    ]
    if limits.min_sparsity is not None:
        actual = stats.prunable_sparsity or 0.0
        ok = stats.reaches(limits.min_sparsity)
        checks.append(LimitCheck("min-sparsity", "prunable_sparsity", limits.min_sparsity, actual, ok, stats.path))
    if limits.baseline is not None and sizes.compressed is not None and limits.baseline.bytes.compressed:
        before = limits.baseline.bytes.compressed
        growth = sizes.compressed - before
        checks.append(_check_max(stats, "max-growth", "bytes.compressed", limits.max_growth_bytes, growth))
        checks.append(_check_max(stats, "max-growth", "bytes.compressed", limits.max_growth_ratio, growth / before))
    return tuple(replace(check, codec=limits.codec) for check in checks if check is not None)


def _check_max(
    stats: ModelStats, name: str, metric: str, limit: float | None, actual: float | None
) -> LimitCheck | None:
    if limit is None or actual is None:
        return None
    return LimitCheck(name, metric, limit, actual, actual <= limit, stats.path)


_NAMED = 3


def growth_sentence(stats: ModelStats, before: Mapping[str, tuple[int, int]], units: Units, least: int = 0) -> str:
    """The tensors that grew most or, if none did, lost most zeros (so that the compressed file grows); or empty.

    `before` maps names of earlier tensors to bytes and zeros; those below `least` bytes may be missing.
    """
    grown: dict[str, int] = {}
    lost: dict[str, int] = {}
    for row in stats.layers:
        if row.tied_to or (row.name not in before and row.bytes < least):
            continue
        size, zeros = before.get(row.name, (0, 0))
        grown[row.name] = row.bytes - size
        lost[row.name] = zeros - (row.zeros or 0)
    if any(size > 0 for size in grown.values()):
        tensors = [f"{name} (+{nbytes(size, units)})" for name, size in _largest(grown)]
        return f"The tensors that grew most: {', '.join(tensors)}."
    tensors = [f"{name} ({count(zeros)} fewer)" for name, zeros in _largest(lost)]
    return f"The tensors that lost most zeros: {', '.join(tensors)}." if tensors else ""


def _largest(numbers: dict[str, int]) -> list[tuple[str, int]]:
    positive = ((abbreviated(name), number) for name, number in numbers.items() if number > 0)
    return sorted(positive, key=lambda item: -item[1])[:_NAMED]


_PHRASES = {
    "max-raw": "{subject} is {actual} on disk",
    "max-packed": "{subject} is {actual} packed",
    "max-gzip": "{subject} is {actual} {compressed}",
    "max-growth": "{subject} {grew} by {actual} {compressed}",
    "growth": "{subject} {grew} by {actual} {compressed}",
    "max-params": "{subject} has {actual} parameters",
    "max-flops": "{subject} takes {actual} FLOPs for one input",
    "min-sparsity": "{actual} of the prunable weights of {subject} are zero",
    "sparsity": "{actual} of {subject} is zero",
    "min-nm": "{actual} of the groups of {subject} follow the pattern",
    "keep-zeros": "{actual} weights of {subject} are no longer zero",
    "min-metric": "the {metric} of {subject} is {actual}",
    "max-metric": "the {metric} of {subject} is {actual}",
    "max-drop": "the {metric} of {subject} is {worse} by {actual}",
    "max-latency": "a run of {subject} takes {actual}",
    "min-speedup": "{subject} is {actual} as fast",
    "nonzero": "{actual} pruned weights of {subject} are no longer zero",
    "shape": "{actual} tensors of {subject} were added, removed or resized",
    "dtype": "{actual} tensors of {subject} have another dtype",
    "changed": "{actual} weights of {subject} changed",
}
"""First half of the sentence on each limit, with the measured value."""
_COMPRESSED = {CodecName.GZIP: "gzipped", CodecName.NONE: "uncompressed"}


@dataclass(frozen=True, slots=True)
class LimitTexts:
    """The formatted numbers of a sentence on a limit, without signs."""

    actual: str
    limit: str
    distance: str
    """Distance of the actual value from the limit."""


def limit_sentence(gate: LimitCheck, subject: str, texts: LimitTexts, *details: str) -> str:
    """A sentence with the measured value and its distance from the limit, without a full stop."""
    # The minimum and the maximum of a single tensor's sparsity have the same phrase.
    name = "sparsity" if gate.metric == "sparsity" else gate.id
    option = gate.id if gate.id != "max-gzip" or gate.codec is CodecName.GZIP else "max-compressed"
    phrase = _PHRASES.get(name, "{subject} has {actual}").format(
        subject=subject,
        actual=texts.actual,
        metric=gate.metric,
        compressed=_COMPRESSED.get(gate.codec, f"compressed with {gate.codec}"),
        grew="shrank" if gate.actual < 0 else "grew",
        worse="better" if gate.actual < 0 else "worse",
    )
    side = "below" if gate.id.startswith("min-") else "over"
    if gate.ok:
        verdict = f"within the limit of {texts.limit}"
    elif gate.limit:
        verdict = f"{texts.distance} {side} the limit of {texts.limit}"
    else:
        verdict = f"the limit is {texts.limit}"
    return f"{phrase}, {verdict} ({'; '.join((option, *details))})"


def percentage_points(distance: float) -> str:
    """A distance between two shares, in percentage points."""
    return f"{100 * distance:.3g} pp" if distance < 1 else f"{100 * distance:,.0f} pp"


def gate_sentence(gate: LimitCheck, units: Units) -> str:
    """The sentence on a limit, with its numbers formatted for users."""
    actual, distance = abs(gate.actual), abs(gate.actual - gate.limit)
    is_hidden = bool(distance) and not gate.ok
    if gate.id == "max-latency":
        texts = LimitTexts(*map(duration, (actual, gate.limit, distance)))
    elif gate.id == "min-speedup":
        texts = LimitTexts(f"{actual:.2f} times", f"{gate.limit:g}", f"{distance:.2g}")
    elif gate.id == "max-drop" and gate.is_share:
        texts = LimitTexts(*map(percentage_points, (actual, gate.limit, distance)))
    elif not gate.is_share:
        texts = LimitTexts(*(f"{value:.4g}" for value in (actual, gate.limit, distance)))
    elif not isinstance(gate.limit, int):
        texts = LimitTexts(percent(actual), percent(gate.limit), percentage_points(distance))
        if texts.actual == texts.limit and is_hidden:
            texts = LimitTexts(f"{actual:.6%}", f"{gate.limit:.6%}", texts.distance)
    else:
        texts = LimitTexts(*(nbytes(int(value), units) for value in (actual, gate.limit, distance)))
        if texts.actual == texts.limit and is_hidden:
            texts = LimitTexts(f"{count(int(actual))} B", f"{count(gate.limit)} B", texts.distance)
    return limit_sentence(gate, printable(gate.model), texts)
