"""Estimate of the gzip size of a large model from a sample of its bytes."""

from __future__ import annotations

import math
import zlib
from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np

from prunectl.analysis.sizes import Codec, measure
from prunectl.analysis.stats import Estimate, ModelStats, SizeStats, measure_stats
from prunectl.analysis.tensor_io import ProgressFactory, no_progress
from prunectl.errors import InputError, reading
from prunectl.formats.base import Array, ModelFile
from prunectl.formats.extents import REMOTE, file_bytes
from prunectl.formats.workers import check_stopped, usable_cores, workers

EXACT_BYTES = 32 << 20
"""Smaller models are compressed whole: sampling them would take as long."""
_PIECE, _PIECES = 256 << 10, 48
"""Bytes of a piece, which is long enough to compress as well as within the whole; first number of pieces."""
_PROBE, _PROBES, _PROBES_OF_PIECE = 8 << 10, 1024, 4
"""Bytes of a probe, quick to compress, but with the overhead of its own Huffman tables; numbers of probes."""
_WINDOW = 32 << 10
"""Window of deflate: how many bytes back it looks for repetitions."""
_TABLE = 40
"""Bytes that the last block of a piece takes in addition; they matter if hardly anything is left of the piece."""
_ALIKE = 1e-6
"""At or below this variance, probes are too alike to predict the ratios of pieces."""
_AIM = 0.01
_CONFIDENCE = 2.0
"""Standard errors of a 95 % interval."""
_MOST = 0.25
"""If the error is still too large after this share of the bytes, the whole model is compressed."""


def estimate_size(model: ModelFile, codec: Codec, meter: ProgressFactory = no_progress) -> ModelStats:
    """Statistics of a model with an estimate of its compressed size (to about 1 %), without zeros or packed size.

    A small model is measured instead, as is one whose error is too large after a quarter of its bytes.
    """
    source = _Source.of(model.files)
    sampled = _sample_ratio(source, codec.level) if source.nbytes > EXACT_BYTES else None
    if sampled is None:
        return measure(model, codec, meter)
    stats = measure_stats(model, model.tensors, has_zeros=False)
    share, estimate = sampled
    sizes = SizeStats(raw=stats.bytes.raw, compressed=round(share * source.nbytes))
    return replace(stats, bytes=sizes, estimate=estimate)


def _sample_ratio(source: _Source, level: int) -> tuple[float, Estimate] | None:
    """The compression ratio of a model and its error; None if the error is too large after too many bytes.

    Double sampling with regression (Cochran, Sampling Techniques, chapter 12): cheap probes at many offsets, and pieces
    at a few offsets, whose ratios are regressed on those of the probes in them.
    """
    random = np.random.default_rng(0)
    pieces, probes = np.empty((0, 2)), np.empty((0, 2))
    more_pieces, more_probes = _PIECES, _PROBES
    with workers(usable_cores()) as pool:
        while True:
            offsets = _strata(random, more_pieces, source.nbytes - _PIECE)
            pieces = np.concatenate([pieces, *pool.map(partial(source.piece, level=level), offsets)])
            offsets = _strata(random, more_probes, source.nbytes - _PROBE)
            probes = np.concatenate([probes, *pool.map(partial(source.probe, level=level), offsets)])
            share, pieces_variance, probes_variance = _regress(pieces, probes[probes[:, 0].argsort(), 1])
            error = (_CONFIDENCE * math.sqrt(pieces_variance + probes_variance) + _TABLE / _PIECE) / share
            sampled = len(pieces) * _PIECE + len(probes) * _PROBE
            if error <= _AIM:
                return share, Estimate(error, sampled)
            if sampled > _MOST * source.nbytes:
                return None
            more_pieces, more_probes = (len(pieces), 0) if pieces_variance > probes_variance else (0, len(probes))


def _strata(random: np.random.Generator, count: int, nbytes: int) -> list[int]:
    """Stratified sampling: a random offset in each of `count` equal strata."""
    return [int(offset) for offset in (np.arange(count) + random.random(count)) * nbytes / max(count, 1)]


def _regress(pieces: Array, probes: Array) -> tuple[float, float, float]:
    """Regression estimate of the mean ratio, and its variances due to pieces and probes (sorted by offset)."""
    probed, shares = pieces.T
    spread = probed.var()
    slope = ((probed - probed.mean()) * (shares - shares.mean())).mean() / spread if spread > _ALIKE else 0.0
    unexplained = shares - shares.mean() - slope * (probed - probed.mean())
    # Neighbouring probes are alike: their differences estimate the variance within a stratum.
    within = (np.diff(probes) ** 2).mean() / 2
    share = shares.mean() + slope * (probes.mean() - probed.mean())
    return share, (unexplained**2).sum() / (len(pieces) - 2) / len(pieces), slope**2 * within / len(probes)


def _deflate_ratio(data: bytes, level: int, window: bytes = b"") -> float:
    """Compressed size of some bytes, as a share of their size; `window` are the bytes before them."""
    compressor = zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS, zdict=window)
    return (len(compressor.compress(data)) + len(compressor.flush())) / len(data)


@dataclass(frozen=True, slots=True)
class _Source:
    """The files of a model, concatenated; the few bytes that a tar adds between them are neglected."""

    files: tuple[Path, ...]
    starts: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, files: tuple[Path, ...]) -> _Source:
        *starts, nbytes = accumulate(map(file_bytes, files), initial=0)
        return cls(files, tuple(starts), nbytes)

    def read(self, begin: int, nbytes: int) -> bytes:
        """Read bytes of the concatenated files, across their boundaries."""
        check_stopped()
        data = b""
        index = bisect_right(self.starts, begin) - 1
        while len(data) < nbytes:
            path, offset = self.files[index], begin + len(data) - self.starts[index]
            more = self._read_file(path, offset, nbytes - len(data))
            index += 1
            if not more and index == len(self.files):
                raise InputError(f"{path} was truncated while prunectl was reading it")
            data += more
        return data

    @staticmethod
    def _read_file(path: Path, begin: int, most: int) -> bytes:
        if path in REMOTE:
            return REMOTE[path].read(begin, min(most, REMOTE[path].nbytes - begin))
        with reading(path), path.open("rb") as file:
            file.seek(begin)
            return file.read(most)

    def probe(self, offset: int, level: int) -> list[tuple[float, float]]:
        """An offset, and the compression ratio of the probe there."""
        return [(offset, _deflate_ratio(self.read(offset, _PROBE), level))]

    def piece(self, offset: int, level: int) -> list[tuple[float, float]]:
        """The mean compression ratio of the probes in a piece, and that of the piece."""
        before = min(offset, _WINDOW)
        data = self.read(offset - before, before + _PIECE)
        window, data = data[:before], data[before:]
        starts = range(0, _PIECE, _PIECE // _PROBES_OF_PIECE)
        probes = (_deflate_ratio(data[begin : begin + _PROBE], level) for begin in starts)
        return [(sum(probes) / _PROBES_OF_PIECE, _deflate_ratio(data, level, window))]
