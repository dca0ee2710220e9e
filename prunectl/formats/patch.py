"""Write a copy of a model with changed tensors, and everything else byte for byte as it was."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prunectl.errors import NO_ROOM, InputError, abbreviated, reading
from prunectl.formats.base import Array, ModelFile, Tensor
from prunectl.formats.extents import BLOCK_BYTES, REMOTE, Extent, file_chunks, raw_bytes, read_ahead
from prunectl.formats.workers import check_stopped, workers

THREADS = 2
"""Enough to write one block while another is computed; more threads would only keep more blocks in memory."""
_COPY_BYTES = 1 << 28
_BATCH_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class TensorUpdate:
    """New values for a tensor, block by block in storage order."""

    tensor: Tensor
    blocks: Callable[[], Iterator[Array]]

    @property
    def run(self) -> Extent:
        """The run of bytes that is replaced."""
        extent = self.tensor.storage.extent
        if extent is None:
            raise ValueError(f"{self.tensor.name} is not stored as one run of bytes")
        begin = extent.offset + self.tensor.start * self.tensor.dtype.itemsize
        return Extent(extent.path, begin, self.tensor.nbytes)

    def raw(self) -> Iterator[memoryview]:
        """Yield the new bytes as they are stored in the file."""
        for block in self.blocks():
            yield raw_bytes(block, big_endian=self.tensor.storage.big_endian)


def in_storage_order(tensor: Tensor, array: Array) -> Array:
    """An array with its axes transposed to storage order: that of descending strides."""
    if tensor.strides is None:
        return array
    steps = tensor.strides
    return array.transpose(sorted(range(array.ndim), key=lambda axis: -steps[axis]))


def is_writable(tensor: Tensor) -> bool:
    """Whether the elements of a tensor are one run of bytes, so that they can be overwritten in place."""
    steps = tensor.strides
    return tensor.storage.extent is not None and (steps is None or is_permuted(tensor.shape, steps))


def is_permuted(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether strides are those of a dense array whose axes may be permuted."""
    expected = 1
    for step, size in sorted((step, size) for step, size in zip(strides, shape, strict=True) if size != 1):
        if step != expected:
            return False
        expected *= size
    return True


def patch_files(_: ModelFile, targets: dict[Path, Path], rewrites: Sequence[TensorUpdate]) -> None:
    """Write every file of a model to its target, with the given updates."""
    runs: dict[Path, list[TensorUpdate]] = {path: [] for path in targets}
    for rewrite in rewrites:
        runs[rewrite.run.path].append(rewrite)
    for source, target in targets.items():
        copy_with_patches(source, target, sorted(runs[source], key=lambda rewrite: rewrite.run.offset))


def copy_with_patches(
    source: Path, target: Path, rewrites: Sequence[TensorUpdate], crcs: dict[Extent, int] | None = None
) -> None:
    """Write a copy of one file with some runs replaced, in one pass over its bytes.

    If `crcs` is given, the CRC-32 of each new run is stored in it.
    """
    if source in REMOTE and not rewrites:
        with target.open("xb") as writer:
            writer.writelines(file_chunks(source))
        return
    old = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    new = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        offset, end = 0, os.fstat(old).st_size
        # Writes have explicit offsets (pwrite), so that threads need not share a file position.
        with workers(THREADS) as pool:
            writing = [pool.submit(_write_runs, new, batch, crcs) for batch in _batches(rewrites)]
            for run in (rewrite.run for rewrite in rewrites):
                copy_range(source, old, new, offset, run.offset)
                offset = run.offset + run.nbytes
            copy_range(source, old, new, offset, end)
            for done in writing:
                done.result()
    finally:
        os.close(old)
        os.close(new)


def _batches(rewrites: Iterable[TensorUpdate]) -> Iterator[list[TensorUpdate]]:
    """Group small updates, in their order: starting a job for each would take longer than the update."""
    batch: list[TensorUpdate] = []
    nbytes = 0
    for rewrite in rewrites:
        batch.append(rewrite)
        nbytes += rewrite.tensor.nbytes
        if nbytes >= _BATCH_BYTES:
            yield batch
            batch, nbytes = [], 0
    if batch:
        yield batch


def _write_runs(new: int, batch: Iterable[TensorUpdate], crcs: dict[Extent, int] | None) -> None:
    with read_ahead():
        for rewrite in batch:
            _write_run(new, rewrite, crcs)


def _write_run(new: int, rewrite: TensorUpdate, crcs: dict[Extent, int] | None) -> None:
    run = rewrite.run
    offset, crc = run.offset, 0
    for view in rewrite.raw():
        check_stopped()
        if crcs is not None:
            crc = zlib.crc32(view, crc)
        remaining = view
        while remaining:
            done = os.pwrite(new, remaining, offset)
            offset, remaining = offset + done, remaining[done:]
    if offset != run.offset + run.nbytes:
        raise ValueError(f"{offset - run.offset} bytes were written in the place of {run.nbytes}")
    if crcs is not None:
        crcs[run] = crc


def copy_range(source: Path, old: int, new: int, begin: int, end: int) -> None:
    """Copy a range of bytes: with `copy_file_range`, which may share the blocks on the disk, where it is available."""
    while begin < end:
        done = 0
        # Small ranges are copied ten times as fast with pread and pwrite.
        is_by_kernel = end - begin > _BATCH_BYTES
        try:
            if is_by_kernel:
                done = os.copy_file_range(old, new, min(end - begin, _COPY_BYTES), begin, begin)
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno in NO_ROOM:
                raise
            # Not supported here or between these filesystems, or a broken disk: then pread or pwrite shows which one.
            is_by_kernel = False
        if not is_by_kernel:
            with reading(source):
                piece = os.pread(old, min(end - begin, 1 << 20), begin)
            done = os.pwrite(new, piece, begin)
        if not done:
            raise InputError(f"{source} was truncated while prunectl was copying it")
        begin += done


HALF_MAX = 65504.0
HALF = np.dtype(np.float16)
HALVED = frozenset({np.dtype(np.float32), np.dtype(np.float64)})
"""Dtypes that `--half` converts to 16-bit floats."""


def pieces(arrays: Sequence[Array]) -> Iterator[tuple[Array, ...]]:
    """Yield arrays of the same shape in pieces along their first axis, in C order."""
    first = arrays[0]
    if first.nbytes <= BLOCK_BYTES or first.ndim == 0:
        yield tuple(arrays)
        return
    rows = max(1, BLOCK_BYTES * len(first) // first.nbytes)
    for begin in range(0, len(first), rows):
        yield tuple(array[begin : begin + rows] for array in arrays)


def apply_mask(weights: Array, masks: Sequence[Array]) -> Iterator[Array]:
    """Yield the weights times their masks; +0.0 where a mask is zero, also for NaN and negative weights."""
    for weight, *factors in pieces([weights, *masks]):
        product = weight
        for factor in factors:
            with np.errstate(all="ignore"):
                times = (product * factor.astype(weight.dtype)).astype(weight.dtype)
            product = np.where(factor.astype(np.float32) != 0, times, np.zeros((), weight.dtype))
        yield product


def broadcast_mask(weights: Array, mask: Array) -> Array | None:
    """A mask broadcast to the shape of its weights; it may have one element for each row. None if it does not fit."""
    if mask.shape == weights.shape:
        return mask
    if weights.ndim > 1 and mask.shape == weights.shape[:1]:
        return np.broadcast_to(mask.reshape(-1, *[1] * (weights.ndim - 1)), weights.shape)
    return None


def to_float16(blocks: Iterable[Array], path: object, name: str) -> Iterator[Array]:
    """Yield 32-bit and wider floats as 16-bit ones; InputError if one is too large for 16 bits."""
    for block in blocks:
        for (piece,) in pieces([block]):
            sizes = np.abs(piece)
            if np.any((sizes > HALF_MAX) & np.isfinite(piece)):
                biggest = float(sizes[np.isfinite(piece)].max())
                raise InputError(
                    f"{path} holds {biggest:g} in {abbreviated(name)}, but the largest 16-bit float is {HALF_MAX:g}",
                    hint="leave out --half",
                )
            yield piece.astype(HALF)
