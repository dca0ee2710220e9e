"""An HDF5 file with some numbers changed: in place where they lie flat, else the file is built again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from prunectl.errors import InputError
from prunectl.formats.base import ModelFile
from prunectl.formats.isolated import in_child
from prunectl.formats.keras.hdf5_attributes import NotPortableError, copy_attributes
from prunectl.formats.keras.pack_h5 import address_of, copied, rebuild
from prunectl.formats.writing import Rewrite, write_flat

_BYTES_PER_SECOND = 1 << 20
_ROOM = 512 << 20


def write(model: ModelFile, targets: dict[Path, Path], rewrites: Sequence[Rewrite]) -> None:
    """Write the file with new numbers in it."""
    if all(rewrite.tensor.storage.extent is not None for rewrite in rewrites):
        write_flat(model, targets, rewrites)
        return
    nbytes = sum(tensor.storage.nbytes for tensor in model.tensors)
    changed = {int(rewrite.tensor.storage.key): rewrite for rewrite in rewrites}
    in_child(
        partial(_rebuild, model.path, targets[model.path], changed),
        model.path,
        seconds=10 + nbytes / _BYTES_PER_SECOND,
        extra_bytes=_ROOM + 3 * max((tensor.nbytes for tensor in model.tensors), default=0),
    )
    for rewrite in rewrites:
        # What a block tells whoever made it, it has told in the child: here it is told again.
        for _ in rewrite.blocks():
            pass


def _rebuild(source: Path, target: Path, changed: Mapping[int, Rewrite]) -> bytes:
    def copy_dataset(old: Any, parent: Any, key: str) -> Any:
        rewrite = changed.get(address_of(old))
        return copied(old, parent, key) if rewrite is None else _with_new_numbers(old, parent, key, rewrite)

    try:
        rebuild(source, target, copy_dataset)
    except NotPortableError as error:
        raise InputError(f"{source} has references or types of its own ({error}), and cannot be built again") from error
    return b""


def _with_new_numbers(old: Any, parent: Any, key: str, rewrite: Rewrite) -> Any:
    kind, space, plan = old.id.get_type().copy(), old.id.get_space(), old.id.get_create_plist()
    new = h5py.Dataset(h5py.h5d.create(parent.id, key.encode("utf-8", "surrogateescape"), kind, space, plan))
    numbers = np.frombuffer(b"".join(rewrite.raw()), np.uint8)
    new.id.write(h5py.h5s.ALL, h5py.h5s.ALL, numbers, mtype=kind)
    copy_attributes(old, new)
    return new
