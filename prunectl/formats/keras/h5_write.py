"""An HDF5 file with some numbers changed: in place where they lie flat, else the file is built again."""

from __future__ import annotations

import tempfile
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
Run = tuple[int, int]
"""Where the numbers of a dataset begin, and how many bytes they are."""


def write(model: ModelFile, targets: dict[Path, Path], rewrites: Sequence[Rewrite]) -> None:
    """Write the file with new numbers in it."""
    if all(rewrite.tensor.storage.extent is not None for rewrite in rewrites):
        write_flat(model, targets, rewrites)
        return
    target = targets[model.path]
    nbytes = sum(tensor.storage.nbytes for tensor in model.tensors)
    # The numbers are made here, once: what makes them counts, may fail with an error of its own, and may be a plug-in
    # that cannot run in a child which has so much memory and no more. The child gets them in a file.
    with tempfile.NamedTemporaryFile(prefix="prunectl-", dir=target.parent) as numbers:
        runs: dict[int, Run] = {}
        for rewrite in rewrites:
            begin = numbers.tell()
            numbers.writelines(rewrite.raw())
            runs[int(rewrite.tensor.storage.key)] = begin, numbers.tell() - begin
        numbers.flush()
        in_child(
            partial(_rebuild, model.path, target, Path(numbers.name), runs),
            model.path,
            seconds=10 + nbytes / _BYTES_PER_SECOND,
            extra_bytes=_ROOM + 3 * max((tensor.nbytes for tensor in model.tensors), default=0),
        )


def _rebuild(source: Path, target: Path, numbers: Path, runs: Mapping[int, Run]) -> bytes:
    makers = {address: partial(_with_new_numbers, numbers, run) for address, run in runs.items()}
    rebuild_changed(source, target, makers, source)
    return b""


def _with_new_numbers(path: Path, run: Run, old: Any, parent: Any, key: str) -> Any:
    begin, nbytes = run
    numbers = np.fromfile(path, np.uint8, nbytes, offset=begin)
    return made_like(old, parent, key, numbers, space=old.id.get_space(), plan=old.id.get_create_plist())
