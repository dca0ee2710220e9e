"""A Keras network as it is to be written: its configuration, and the weights that are others than in the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from prunectl.channels.keras.read import Opened
from prunectl.formats import zip_write
from prunectl.formats.base import Array
from prunectl.formats.isolated import in_child
from prunectl.formats.keras import h5_edit
from prunectl.formats.keras.archive import WEIGHTS
from prunectl.formats.keras.edits import Edits
from prunectl.formats.keras.h5_changed import made_like, rebuild_changed
from prunectl.formats.keras.pack_h5 import address_of
from prunectl.formats.scratch import temporary_folder
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
    with temporary_folder() as scratch:
        weights = scratch / WEIGHTS
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
            written=(target,),
        )
    finally:
        edited.unlink(missing_ok=True)


def _rebuilt(source: Path, target: Path, arrays: Mapping[str, Array], shown: Path) -> bytes:
    with h5py.File(source, "r", locking=False) as file:
        makers = {address_of(file[path]): partial(_resized, array) for path, array in arrays.items()}
    rebuild_changed(source, target, makers, shown)
    return b""


def _resized(array: Array, old: Any, parent: Any, key: str) -> Any:
    """Return a dataset with other numbers, stored and compressed as the old one was."""
    plan = old.id.get_create_plist()
    if plan.get_layout() == h5py.h5d.CHUNKED:
        chunks = zip(plan.get_chunk(), array.shape, strict=True)
        plan.set_chunk(tuple(max(1, min(pair)) for pair in chunks))
    numbers = array.view(np.uint8) if array.dtype.isbuiltin != 1 else array
    return made_like(old, parent, key, numbers, space=h5py.h5s.create_simple(array.shape), plan=plan)
