"""Rebuild an HDF5 file object by object; packing gzips its datasets in chunks."""

from __future__ import annotations

import itertools
import shutil
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from prunectl.formats.base import ModelFile
from prunectl.formats.sandbox import run_sandboxed


class UncopyableError(Exception):
    """An object that is only valid in its own file, such as a reference."""


def copy_attributes(old: Any, new: Any) -> None:
    """Copy the attributes of an object to another, bit for bit and in the same order."""
    for key in old.attrs:
        attribute = old.attrs.get_id(key)
        kind = attribute.get_type()
        if kind.detect_class(h5py.h5t.REFERENCE):
            raise UncopyableError(key)
        name = key.encode("utf-8", "surrogateescape")
        new_attribute = h5py.h5a.create(new.id, name, kind.copy(), attribute.get_space())
        if attribute.shape is None:
            continue
        if attribute.dtype.hasobject:
            # Variable-length strings are Python objects in memory; the type in the file decides how they are stored.
            values, memory = np.empty(attribute.shape, attribute.dtype), h5py.h5t.py_create(attribute.dtype)
        else:
            values, memory = np.empty((*attribute.shape, kind.get_size()), np.uint8), kind
        attribute.read(values, mtype=memory)
        new_attribute.write(values, mtype=memory)


LEVEL = 6
_CHUNK_BYTES = 4 << 20
_WORTH = 0.95
"""A dataset is gzipped only if that reduces its first chunk to this share, or less."""
_OVERHEAD_BYTES = 64
"""Bytes that the description of chunks and filters takes."""

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""A piece of an array: where it begins, and its lengths."""


def gzipped(old: Any, parent: Any, key: str) -> Any:
    """A gzipped copy of a dataset, without its attributes; None if that is impossible or would not pay."""
    properties = old.id.get_create_plist()
    chunk = chunk_of(old.shape or (), old.dtype.itemsize)
    if chunk is None or properties.get_nfilters() or old.dtype.hasobject or old.dtype.kind not in "fiubcV":
        return None
    is_shuffled = _best(_read(old, (0,) * len(chunk), chunk), old.dtype.itemsize)
    if is_shuffled is None:
        return None
    properties.set_chunk(chunk)
    if is_shuffled:
        properties.set_shuffle()
    properties.set_deflate(LEVEL)
    kind = old.id.get_type().copy()
    new = create_dataset(parent, key, kind, old.id.get_space(), properties)
    for begin, lengths in boxes(old.shape, chunk):
        memory, selection = _selected(new, begin, lengths)
        new.id.write(memory, selection, _read(old, begin, lengths), mtype=kind)
    return new


def create_dataset(parent: Any, key: str, kind: Any, space: Any, properties: Any) -> Any:
    """A new, empty dataset in a group, without its time of creation, which would make two runs differ."""
    properties.set_obj_track_times(False)
    return h5py.Dataset(h5py.h5d.create(parent.id, key.encode("utf-8", "surrogateescape"), kind, space, properties))


def chunk_of(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...] | None:
    """A chunk shape of at most 4 MiB, contiguous in memory; None for a shape that cannot be chunked."""
    if not shape or 0 in shape:
        return None
    room = max(_CHUNK_BYTES // itemsize, 1)
    lengths: list[int] = []
    for length in reversed(shape):
        lengths.append(max(min(length, room), 1))
        room //= lengths[-1]
    return tuple(reversed(lengths))


def boxes(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[Box]:
    """Yield every chunk of an array; those at its edges are cut short."""
    for begin in itertools.product(*(range(0, length, step) for length, step in zip(shape, chunk, strict=True))):
        ends = zip(shape, begin, chunk, strict=True)
        yield begin, tuple(min(step, length - start) for length, start, step in ends)


def _read(dataset: Any, begin: tuple[int, ...], lengths: tuple[int, ...]) -> NDArray[np.uint8]:
    """A piece of a dataset as raw bytes: types that NumPy does not know pass unchanged."""
    kind = dataset.id.get_type()
    raw = np.empty((*lengths, kind.get_size()), np.uint8)
    memory, selection = _selected(dataset, begin, lengths)
    dataset.id.read(memory, selection, raw, mtype=kind)
    return raw


def _selected(dataset: Any, begin: tuple[int, ...], lengths: tuple[int, ...]) -> tuple[Any, Any]:
    selection = dataset.id.get_space()
    selection.select_hyperslab(begin, lengths)
    return h5py.h5s.create_simple(lengths), selection


def _best(first: NDArray[np.uint8], itemsize: int) -> bool | None:
    """Whether to shuffle bytes before gzip, tried on one chunk; None if gzip pays neither way."""
    plain = len(zlib.compress(first.tobytes(), LEVEL))
    shuffled = len(zlib.compress(first.reshape(-1, itemsize).T.tobytes(), LEVEL))
    if min(plain, shuffled) + _OVERHEAD_BYTES > _WORTH * first.size:
        return None
    return shuffled < plain


_NEWER = (h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_V110)
"""The file format of HDF5 1.10 (2016), which needs no tree of kilobytes to find a single chunk."""
_BYTES_PER_SECOND = 1 << 20
_ROOM = 512 << 20

CopyDataset = Callable[[Any, Any, str], Any]
"""Copies a dataset to a group of another file, under a name: (old, parent, key) -> new dataset."""
Copies = dict[int, Any]
"""Copies in the new file, by the address of the object in the old one."""


def pack(model: ModelFile, target: Path, tick: Callable[[int], None]) -> None:
    """Write a packed copy of an HDF5 file, in a child, since a damaged file may crash libhdf5."""
    nbytes = model.path.stat().st_size
    run_rewriting(partial(_pack, model.path, target), model.path, nbytes, 2 * nbytes, (target,))
    tick(nbytes)


def run_rewriting(
    work: Callable[[], bytes], shown: Path, nbytes: int, extra_bytes: int, written: tuple[Path, ...]
) -> None:
    """Rewrite an HDF5 file of ``nbytes`` in a child, with ``extra_bytes`` of memory beyond what libhdf5 needs."""
    seconds = 10 + nbytes / _BYTES_PER_SECOND
    run_sandboxed(work, shown, seconds=seconds, extra_bytes=_ROOM + extra_bytes, written=written)


def _pack(source: Path, target: Path) -> bytes:
    try:
        rebuild_file(source, target, _copy_dataset)
    except UncopyableError:
        shutil.copyfile(source, target)
    return b""


def rebuild_file(source: Path, target: Path, copy_dataset: CopyDataset) -> None:
    """Write a copy of a file, group by group; ``copy_dataset`` copies each dataset."""
    with h5py.File(source, "r", locking=False) as old, _created(target, old["/"]) as new:
        copy_attributes(old, new)
        _copy_members(old, new, {address_of(old["/"]): new["/"]}, copy_dataset)
        new.flush()


def _copy_members(old: Any, new: Any, copies: Copies, copy_dataset: CopyDataset) -> None:
    for key in old:
        link = old.get(key, getlink=True)
        if not isinstance(link, h5py.HardLink):
            new[key] = link
            continue
        member = old[key]
        address = address_of(member)
        if address in copies:
            new[key] = copies[address]
        elif isinstance(member, h5py.Group):
            copies[address] = group = _created_group(new, key, member)
            copy_attributes(member, group)
            _copy_members(member, group, copies, copy_dataset)
        elif isinstance(member, h5py.Dataset):
            copies[address] = copy_dataset(member, new, key)
            # Libhdf5 writes lazily, and closing a dataset does not report a full disk.
            copies[address].id.flush()
        else:
            raise UncopyableError(key)


def _copy_dataset(old: Any, parent: Any, key: str) -> Any:
    new = gzipped(old, parent, key)
    if new is not None:
        copy_attributes(old, new)
        return new
    return copied(old, parent, key)


def copied(old: Any, parent: Any, key: str) -> Any:
    """An unchanged copy of a dataset."""
    if old.id.get_type().detect_class(h5py.h5t.REFERENCE):
        raise UncopyableError(key)
    old.file.copy(old, parent, key)
    return parent[key]


def address_of(member: Any) -> int:
    """The address of an object, unique in its file."""
    return int(h5py.h5o.get_info(member.id).addr)


def _created(target: Path, old_root: Any) -> Any:
    """A new file whose root tracks the order of its members if the old one does."""
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_libver_bounds(*_NEWER)
    properties = _like(old_root, h5py.h5p.create(h5py.h5p.FILE_CREATE))
    return h5py.File(h5py.h5f.create(bytes(target), h5py.h5f.ACC_TRUNC, properties, access))


def _created_group(parent: Any, key: str, old: Any) -> Any:
    properties = _like(old, h5py.h5p.create(h5py.h5p.GROUP_CREATE))
    return h5py.Group(h5py.h5g.create(parent.id, key.encode("utf-8", "surrogateescape"), gcpl=properties))


def _like(old: Any, properties: Any) -> Any:
    """Make a new group track order as the old one does, and store no times, which would make two runs differ."""
    old_properties = old.id.get_create_plist()
    properties.set_link_creation_order(old_properties.get_link_creation_order())
    properties.set_attr_creation_order(old_properties.get_attr_creation_order())
    properties.set_obj_track_times(False)
    return properties
