"""One dataset of an HDF5 file written again in gzipped chunks, where that pays: to be called in a child."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

LEVEL = 6
_CHUNK_BYTES = 4 << 20
_WORTH = 0.95
"""A dataset that stays bigger than this share of itself is left as it is."""
_OVERHEAD_BYTES = 64
"""What the description of chunks and filters takes."""

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Where a piece of an array begins, and its lengths."""


def gzipped(old: Any, parent: Any, key: str) -> Any:
    """Return a gzipped copy of a dataset, without its attributes; None where that would not pay."""
    plan = old.id.get_create_plist()
    chunk = chunk_of(old.shape or (), old.dtype.itemsize)
    if chunk is None or plan.get_nfilters() or old.dtype.hasobject or old.dtype.kind not in "fiubcV":
        return None
    is_shuffled = _best(_read(old, (0,) * len(chunk), chunk), old.dtype.itemsize)
    if is_shuffled is None:
        return None
    plan.set_obj_track_times(False)
    plan.set_chunk(chunk)
    if is_shuffled:
        plan.set_shuffle()
    plan.set_deflate(LEVEL)
    kind, space = old.id.get_type().copy(), old.id.get_space()
    new = h5py.Dataset(h5py.h5d.create(parent.id, key.encode("utf-8", "surrogateescape"), kind, space, plan))
    for begin, lengths in boxes(old.shape, chunk):
        memory, place = _selected(new, begin, lengths)
        new.id.write(memory, place, _read(old, begin, lengths), mtype=kind)
    return new


def chunk_of(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...] | None:
    """Return the lengths of pieces that are not too big and lie together; none for what cannot be chunked."""
    if not shape or 0 in shape:
        return None
    room = max(_CHUNK_BYTES // itemsize, 1)
    lengths: list[int] = []
    for length in reversed(shape):
        lengths.append(max(min(length, room), 1))
        room //= lengths[-1]
    return tuple(reversed(lengths))


def boxes(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[Box]:
    """Yield every chunk of an array, those at its edges cut short."""
    for begin in itertools.product(*(range(0, length, step) for length, step in zip(shape, chunk, strict=True))):
        ends = zip(shape, begin, chunk, strict=True)
        yield begin, tuple(min(step, length - start) for length, start, step in ends)


def _read(dataset: Any, begin: tuple[int, ...], lengths: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return a piece of a dataset as raw bytes: types that NumPy does not know pass unchanged."""
    kind = dataset.id.get_type()
    raw = np.empty((*lengths, kind.get_size()), np.uint8)
    memory, place = _selected(dataset, begin, lengths)
    dataset.id.read(memory, place, raw, mtype=kind)
    return raw


def _selected(dataset: Any, begin: tuple[int, ...], lengths: tuple[int, ...]) -> tuple[Any, Any]:
    place = dataset.id.get_space()
    place.select_hyperslab(begin, lengths)
    return h5py.h5s.create_simple(lengths), place


def _best(first: NDArray[np.uint8], itemsize: int) -> bool | None:
    """Return whether bytes should be shuffled before they are gzipped, tried on a chunk; None if neither pays."""
    plain = len(zlib.compress(first.tobytes(), LEVEL))
    shuffled = len(zlib.compress(first.reshape(-1, itemsize).T.tobytes(), LEVEL))
    if min(plain, shuffled) + _OVERHEAD_BYTES > _WORTH * first.size:
        return None
    return shuffled < plain
