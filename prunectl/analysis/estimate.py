"""The gzip size of a big model, estimated from a sample of its bytes."""

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
"""What is smaller is measured: sampling it would take as long."""
_PIECE, _PIECES = 256 << 10, 48
"""Bytes of a piece, which deflate makes of what it makes in the whole; and how many of them are tried."""
_PROBE, _PROBES, _PROBES_OF_PIECE = 8 << 10, 1024, 4
"""Bytes of a probe, which is quick, but has Huffman tables of its own to pay for."""
_WINDOW = 32 << 10
"""How far back deflate looks for what it has seen."""
_TABLE = 40
"""Bytes that the last block of a piece costs more than in the whole, which matter where there is next to nothing."""
_ALIKE = 1e-6
"""Variance of probes that say nothing about pieces."""
_AIM = 0.01
_CONFIDENCE = 2.0
"""Standard errors of a 95 % interval."""
_MOST = 0.25
"""Share of the bytes beyond which all of them are compressed: the sample tells too little."""


def estimate_size(model: ModelFile, codec: Codec, meter: ProgressFactory = no_progress) -> ModelStats:
    """The facts of a model, with its compressed size to about 1 %: no zero is counted and nothing packed.

    A small model is measured, and so is one of which a quarter of the bytes says too little.
    """
    source = _Source.of(model.files)
    sampled = _sampled(source, codec.level) if source.nbytes > EXACT_BYTES else None
    if sampled is None:
        return measure(model, codec, meter)
    stats = measure_stats(model, model.tensors, has_zeros=False)
    share, estimate = sampled
    sizes = SizeStats(raw=stats.bytes.raw, compressed=round(share * source.nbytes))
    return replace(stats, bytes=sizes, estimate=estimate)


def _sampled(source: _Source, level: int) -> tuple[float, Estimate] | None:
    """The share that gzip leaves of a model; None if too little is known after too many bytes.

    Double sampling with regression (Cochran, Sampling Techniques, chapter 12): probes at many places say how much of
    the model is like what, and pieces at a few places what gzip makes of that.
    """
    random = np.random.default_rng(0)
    pieces, probes = np.empty((0, 2)), np.empty((0, 2))
    more_pieces, more_probes = _PIECES, _PROBES
    with workers(usable_cores()) as pool:
        while True:
            places = _strata(random, more_pieces, source.nbytes - _PIECE)
            pieces = np.concatenate([pieces, *pool.map(partial(source.piece, level=level), places)])
            places = _strata(random, more_probes, source.nbytes - _PROBE)
            probes = np.concatenate([probes, *pool.map(partial(source.probe, level=level), places)])
            share, of_pieces, of_probes = _regress(pieces, probes[probes[:, 0].argsort(), 1])
            error = (_CONFIDENCE * math.sqrt(of_pieces + of_probes) + _TABLE / _PIECE) / share
            sampled = len(pieces) * _PIECE + len(probes) * _PROBE
            if error <= _AIM:
                return share, Estimate(error, sampled)
            if sampled > _MOST * source.nbytes:
                return None
            more_pieces, more_probes = (len(pieces), 0) if of_pieces > of_probes else (0, len(probes))


def _strata(random: np.random.Generator, count: int, nbytes: int) -> list[int]:
    """A place in each of so many equal parts."""
    return [int(place) for place in (np.arange(count) + random.random(count)) * nbytes / max(count, 1)]


def _regress(pieces: Array, probes: Array) -> tuple[float, float, float]:
    """The mean share of pieces all over the model, and its variance by the choice of pieces, and of probes in order."""
    probed, shares = pieces.T
    spread = probed.var()
    slope = ((probed - probed.mean()) * (shares - shares.mean())).mean() / spread if spread > _ALIKE else 0.0
    unexplained = shares - shares.mean() - slope * (probed - probed.mean())
    # Neighbours are alike: what lies between them is what a place in a stratum leaves to chance.
    between = (np.diff(probes) ** 2).mean() / 2
    share = shares.mean() + slope * (probes.mean() - probed.mean())
    return share, (unexplained**2).sum() / (len(pieces) - 2) / len(pieces), slope**2 * between / len(probes)


def _deflated(data: bytes, level: int, window: bytes = b"") -> float:
    """The share that is left of some bytes, which follow others."""
    compressor = zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS, zdict=window)
    return (len(compressor.compress(data)) + len(compressor.flush())) / len(data)


@dataclass(frozen=True, slots=True)
class _Source:
    """The files of a model, as if they were one; what a tar puts between them is next to nothing."""

    files: tuple[Path, ...]
    starts: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, files: tuple[Path, ...]) -> _Source:
        *starts, nbytes = accumulate(map(file_bytes, files), initial=0)
        return cls(files, tuple(starts), nbytes)

    def read(self, begin: int, nbytes: int) -> bytes:
        """Bytes from a place on, of as many files as it takes."""
        check_stopped()
        data = b""
        index = bisect_right(self.starts, begin) - 1
        while len(data) < nbytes:
            path, at = self.files[index], begin + len(data) - self.starts[index]
            more = self._read_of(path, at, nbytes - len(data))
            index += 1
            if not more and index == len(self.files):
                raise InputError(f"{path} was truncated while prunectl was reading it")
            data += more
        return data

    @staticmethod
    def _read_of(path: Path, begin: int, most: int) -> bytes:
        if path in REMOTE:
            return REMOTE[path].read(begin, min(most, REMOTE[path].nbytes - begin))
        with reading(path), path.open("rb") as file:
            file.seek(begin)
            return file.read(most)

    def probe(self, place: int, level: int) -> list[tuple[float, float]]:
        """A place, and the share that is left of the few bytes there."""
        return [(place, _deflated(self.read(place, _PROBE), level))]

    def piece(self, place: int, level: int) -> list[tuple[float, float]]:
        """The share that is left of some probes in a piece, and of the piece."""
        before = min(place, _WINDOW)
        data = self.read(place - before, before + _PIECE)
        window, data = data[:before], data[before:]
        starts = range(0, _PIECE, _PIECE // _PROBES_OF_PIECE)
        probes = (_deflated(data[begin : begin + _PROBE], level) for begin in starts)
        return [(sum(probes) / _PROBES_OF_PIECE, _deflated(data, level, window))]
