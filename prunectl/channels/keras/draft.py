"""A Keras network as it is to be written: its configuration, and the weights that are others than in the file."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from prunectl.channels.keras.read import Opened
from prunectl.errors import InputError
from prunectl.formats import zip_write
from prunectl.formats.base import Array
from prunectl.formats.isolated import in_child
from prunectl.formats.keras import h5_edit
from prunectl.formats.keras.archive import WEIGHTS
from prunectl.formats.keras.edits import Edits
from prunectl.formats.keras.hdf5_attributes import NotPortableError, copy_attributes
from prunectl.formats.keras.pack_h5 import address_of, copied, rebuild
from prunectl.formats.zips import open_archive

_CONFIG = "config.json"
_BYTES_PER_SECOND = 1 << 20
_ROOM = 512 << 20
_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Draft:
    """Changes to a file; None where the configuration stays as it is."""

    config: Mapping[str, Any] | None = None
    arrays: Mapping[str, Array] = field(default_factory=dict)
    """Weights by their names."""


def write(opened: Opened, draft: Draft, target: Path) -> None:
    """Write a file that is laid out like the one that was read."""
    model = opened.model
    if model.format == "keras-h5":
        attributes: dict[tuple[str, str], str | list[str] | None] = (
            {} if draft.config is None else {("", "model_config"): json.dumps(draft.config)}
        )
        _write_h5(opened, draft, Edits(attributes=attributes), target)
        return
    with tempfile.TemporaryDirectory(prefix="prunectl-") as scratch:
        weights = Path(scratch) / WEIGHTS
        _write_h5(opened, draft, Edits(), weights)
        with weights.open("rb") as file:
            pieces = iter(partial(file.read, _PIECE), b"")
            changed: dict[str, Any] = {WEIGHTS: (weights.stat().st_size, pieces)}
            if draft.config is not None:
                text = json.dumps(draft.config).encode()
                changed[_CONFIG] = (len(text), [text])
            zip_write.rebuild(open_archive(model.path), target, changed)


def _write_h5(opened: Opened, draft: Draft, edits: Edits, target: Path) -> None:
    stored = opened.stored
    paths = {tensor.name: stored.path(tensor) for tensor in opened.model.tensors}
    arrays = {paths[name]: np.ascontiguousarray(array) for name, array in draft.arrays.items()}
    edited = target.with_name(f"{target.name}.edited")
    nbytes = stored.file.stat().st_size
    try:
        h5_edit.edit(stored.file, edited, edits, stored.contents, opened.model.path)
        in_child(
            partial(_rebuilt, edited, target, arrays, opened.model.path),
            opened.model.path,
            seconds=10 + nbytes / _BYTES_PER_SECOND,
            extra_bytes=_ROOM + 2 * nbytes,
        )
    finally:
        edited.unlink(missing_ok=True)


def _rebuilt(source: Path, target: Path, arrays: Mapping[str, Array], shown: Path) -> bytes:
    with h5py.File(source, "r", locking=False) as file:
        changed = {address_of(file[path]): array for path, array in arrays.items()}

    def copy_dataset(old: Any, parent: Any, key: str) -> Any:
        array = changed.get(address_of(old))
        return copied(old, parent, key) if array is None else _resized(old, parent, key, array)

    try:
        rebuild(source, target, copy_dataset)
    except NotPortableError as error:
        raise InputError(f"{shown} has references or types of its own ({error}), and cannot be built again") from error
    return b""


def _resized(old: Any, parent: Any, key: str, array: Array) -> Any:
    """Return a dataset with other numbers, stored and compressed as the old one was."""
    plan = old.id.get_create_plist()
    if plan.get_layout() == h5py.h5d.CHUNKED:
        chunks = zip(plan.get_chunk(), array.shape, strict=True)
        plan.set_chunk(tuple(max(1, min(pair)) for pair in chunks))
    kind, space = old.id.get_type().copy(), h5py.h5s.create_simple(array.shape)
    new = h5py.Dataset(h5py.h5d.create(parent.id, key.encode("utf-8", "surrogateescape"), kind, space, plan))
    new.id.write(h5py.h5s.ALL, h5py.h5s.ALL, array.view(np.uint8) if array.dtype.isbuiltin != 1 else array, mtype=kind)
    copy_attributes(old, new)
    return new
