"""An HDF5 file built again with some of its datasets made anew."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py

from prunectl.errors import InputError
from prunectl.formats.keras.hdf5_attributes import NotPortableError, copy_attributes
from prunectl.formats.keras.pack_h5 import CopyDataset, address_of, copied, rebuild


def rebuild_changed(source: Path, target: Path, changed: Mapping[int, CopyDataset], shown: Path) -> None:
    """Build a file again, with functions for datasets at some addresses; ``shown`` is what the user calls it."""

    def copy_dataset(old: Any, parent: Any, key: str) -> Any:
        return changed.get(address_of(old), copied)(old, parent, key)

    try:
        rebuild(source, target, copy_dataset)
    except NotPortableError as error:
        raise InputError(f"{shown} has references or types of its own ({error}), and cannot be built again") from error


def made_like(old: Any, parent: Any, key: str, numbers: Any, *, space: Any, plan: Any) -> Any:
    """Return a dataset of the type of an old one, with its attributes, and other numbers."""
    kind = old.id.get_type().copy()
    # The time of its making would make two runs differ.
    plan.set_obj_track_times(False)
    new = h5py.Dataset(h5py.h5d.create(parent.id, key.encode("utf-8", "surrogateescape"), kind, space, plan))
    new.id.write(h5py.h5s.ALL, h5py.h5s.ALL, numbers, mtype=kind)
    copy_attributes(old, new)
    return new
