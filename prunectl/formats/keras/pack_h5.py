"""The same HDF5 file with its datasets chunked and gzipped, which every reader of HDF5 undoes by itself."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import h5py

from prunectl.formats.base import ModelFile
from prunectl.formats.isolated import in_child
from prunectl.formats.keras.hdf5_attributes import NotPortableError, copy_attributes
from prunectl.formats.keras.hdf5_chunks import gzipped

_NEWER = (h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_V110)
"""The layout of HDF5 1.10 (2016) finds a single chunk without a tree of kilobytes."""
_BYTES_PER_SECOND = 1 << 20
_ROOM = 512 << 20

CopyDataset = Callable[[Any, Any, str], Any]
"""Makes a dataset in another group of an old one, under a name."""
Copies = dict[int, Any]
"""What an object of the old file, known by its address, became in the new one."""


def pack(model: ModelFile, target: Path, tick: Callable[[int], None]) -> None:
    """Write an HDF5 file again, in a child, since libhdf5 may not survive what it reads."""
    nbytes = model.path.stat().st_size
    in_child(
        partial(_pack, model.path, target),
        model.path,
        seconds=10 + nbytes / _BYTES_PER_SECOND,
        extra_bytes=_ROOM + 2 * nbytes,
        written=(target,),
    )
    tick(nbytes)


def _pack(source: Path, target: Path) -> bytes:
    try:
        rebuild(source, target, _copy_dataset)
    except NotPortableError:
        shutil.copyfile(source, target)
    return b""


def rebuild(source: Path, target: Path, copy_dataset: CopyDataset) -> None:
    """Write a file again, group by group, with what ``copy_dataset`` makes of each dataset."""
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
        thing = old[key]
        address = address_of(thing)
        if address in copies:
            new[key] = copies[address]
        elif isinstance(thing, h5py.Group):
            copies[address] = group = _created_group(new, key, thing)
            copy_attributes(thing, group)
            _copy_members(thing, group, copies, copy_dataset)
        elif isinstance(thing, h5py.Dataset):
            copies[address] = copy_dataset(thing, new, key)
            # Libhdf5 writes late, and a dataset that is closed does not say that its disk was full.
            copies[address].id.flush()
        else:
            raise NotPortableError(key)


def _copy_dataset(old: Any, parent: Any, key: str) -> Any:
    new = gzipped(old, parent, key)
    if new is not None:
        copy_attributes(old, new)
        return new
    return copied(old, parent, key)


def copied(old: Any, parent: Any, key: str) -> Any:
    """Return a copy of a dataset as it is."""
    if old.id.get_type().detect_class(h5py.h5t.REFERENCE):
        raise NotPortableError(key)
    old.file.copy(old, parent, key)
    return parent[key]


def address_of(thing: Any) -> int:
    """Return what tells an object from every other in its file."""
    return int(h5py.h5o.get_info(thing.id).addr)


def _created(target: Path, old_root: Any) -> Any:
    """Return a new file whose root remembers the order of its members if the old one does."""
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_libver_bounds(*_NEWER)
    create = _like(old_root, h5py.h5p.create(h5py.h5p.FILE_CREATE))
    return h5py.File(h5py.h5f.create(bytes(target), h5py.h5f.ACC_TRUNC, create, access))


def _created_group(parent: Any, key: str, old: Any) -> Any:
    create = _like(old, h5py.h5p.create(h5py.h5p.GROUP_CREATE))
    return h5py.Group(h5py.h5g.create(parent.id, key.encode("utf-8", "surrogateescape"), gcpl=create))


def _like(old: Any, create: Any) -> Any:
    """Set how a group is created: in the old one's order, and without the time of day, which would differ each time."""
    plan = old.id.get_create_plist()
    create.set_link_creation_order(plan.get_link_creation_order())
    create.set_attr_creation_order(plan.get_attr_creation_order())
    create.set_obj_track_times(False)
    return create
