"""The same HDF5 file with its datasets chunked and gzipped, which every reader of HDF5 undoes by itself."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from prunectl.formats.base import ModelFile
from prunectl.formats.isolated import in_child

LEVEL = 6
_CHUNK_BYTES = 4 << 20
_NEWER = ("v110", "v110")
"""The layout of HDF5 1.10 (2016) finds a single chunk without a tree of kilobytes."""
_WORTH = 0.95
"""A dataset that stays bigger than this share of itself is left as it is."""
_BYTES_PER_SECOND = 1 << 20
_ROOM = 512 << 20


def pack(model: ModelFile, target: Path, tick: Callable[[int], None]) -> None:
    """Write an HDF5 file again, in a child, since libhdf5 may not survive what it reads."""
    nbytes = model.path.stat().st_size
    in_child(
        partial(_pack, model.path, target),
        model.path,
        seconds=10 + nbytes / _BYTES_PER_SECOND,
        extra_bytes=_ROOM + 2 * nbytes,
    )
    tick(nbytes)


def _pack(source: Path, target: Path) -> bytes:
    with h5py.File(source, "r", locking=False) as old, h5py.File(target, "w", libver=_NEWER) as new:
        _copy_attributes(old, new)
        _copy_members(old, new)
    return b""


def _copy_members(old: Any, new: Any) -> None:
    for key in old:
        thing = old[key]
        if isinstance(thing, h5py.Group):
            group = new.create_group(key)
            _copy_attributes(thing, group)
            _copy_members(thing, group)
        elif isinstance(thing, h5py.Dataset):
            _copy_dataset(thing, new, key)


def _copy_dataset(old: Any, parent: Any, key: str) -> None:
    chunks = _chunks(old.shape or (), old.dtype.itemsize)
    filters = _filters(old, chunks) if chunks and old.dtype.kind in "fiuV" else None
    if chunks is None or filters is None:
        old.file.copy(old, parent, key)
        return
    new = parent.create_dataset(key, old.shape, old.dtype, chunks=chunks, **filters)
    for begin in range(0, old.shape[0], chunks[0]):
        new[begin : begin + chunks[0]] = old[begin : begin + chunks[0]]
    _copy_attributes(old, new)


def _chunks(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...] | None:
    """Return the biggest pieces of whole rows that are not too big; none for what is too small to chunk."""
    if not shape or 0 in shape:
        return None
    row_bytes = itemsize * int(np.prod(shape[1:], dtype=np.int64))
    return (max(min(shape[0], _CHUNK_BYTES // max(row_bytes, 1)), 1), *shape[1:])


def _filters(dataset: Any, chunks: tuple[int, ...]) -> dict[str, Any] | None:
    """Return the filters that serve a dataset best, tried on its first chunk; None if none pays."""
    first = np.ascontiguousarray(dataset[: chunks[0]])
    raw = first.tobytes()
    plain = len(zlib.compress(raw, LEVEL))
    shuffled = len(zlib.compress(first.view(np.uint8).reshape(-1, first.dtype.itemsize).T.tobytes(), LEVEL))
    if min(plain, shuffled) > _WORTH * len(raw):
        return None
    return {"compression": "gzip", "compression_opts": LEVEL, "shuffle": shuffled < plain}


def _copy_attributes(old: Any, new: Any) -> None:
    for key in old.attrs:
        kind = old.attrs.get_id(key)
        new.attrs.create(key, old.attrs[key], kind.shape, kind.dtype)
