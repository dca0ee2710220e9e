"""An HDF5 file with some numbers changed: in place where they lie flat, else the file is built again."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from prunectl.formats.base import ModelFile
from prunectl.formats.extents import BYTE, Extent, view
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
    target = targets[model.path]
    # The numbers are made here, once: what makes them counts, may fail with an error of its own, and may be a plug-in
    # that cannot run in a child which has so much memory and no more. The child gets them in a file.
    with tempfile.NamedTemporaryFile(prefix="numbers-", dir=target.parent) as numbers:
        changed: dict[int, Extent] = {}
        for rewrite in rewrites:
            begin = numbers.tell()
            numbers.writelines(rewrite.raw())
            changed[int(rewrite.tensor.storage.key)] = Extent(Path(numbers.name), begin, numbers.tell() - begin)
        numbers.flush()
        in_child(
            partial(_rebuild, model.path, target, changed),
            model.path,
            seconds=10 + nbytes / _BYTES_PER_SECOND,
            extra_bytes=_ROOM + 3 * max((tensor.nbytes for tensor in model.tensors), default=0),
            written=(target,),
        )


def _rebuild(source: Path, target: Path, changed: Mapping[int, Extent]) -> bytes:
    makers = {address: partial(_with_new_numbers, numbers) for address, numbers in changed.items()}
    rebuild_changed(source, target, makers, source)
    return b""


def _with_new_numbers(where: Extent, old: Any, parent: Any, key: str) -> Any:
    numbers = view(where, dtype=BYTE, shape=(where.nbytes,))
    return made_like(old, parent, key, numbers, space=old.id.get_space(), plan=old.id.get_create_plist())
