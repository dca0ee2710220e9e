"""An HDF5 file with some numbers changed: in place where they lie flat, else the file is built again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.formats.base import ModelFile
from prunectl.formats.isolated import in_child
from prunectl.formats.keras.h5_changed import made_like, rebuild_changed
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
    makers = {address: partial(_with_new_numbers, rewrite) for address, rewrite in changed.items()}
    rebuild_changed(source, target, makers, source)
    return b""


def _with_new_numbers(rewrite: Rewrite, old: Any, parent: Any, key: str) -> Any:
    numbers = np.frombuffer(b"".join(rewrite.raw()), np.uint8)
    return made_like(old, parent, key, numbers, space=old.id.get_space(), plan=old.id.get_create_plist())
