"""The size of what was written, also of formats that are written only."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from prunectl.exporting.targets import Target
from prunectl.formats.base import About, Array, ModelFile, Role, Storage, Tensor
from prunectl.formats.table import open_model
from prunectl.measuring.archive import stream
from prunectl.measuring.codecs import CodecName, compress, pick
from prunectl.measuring.survey import Bytes, Survey, survey
from prunectl.pruning.output import BIG_BYTES
from prunectl.pruning.strip import surveyed


def measured(path: Path, target: Target) -> Survey:
    """Return what is in a file that was written."""
    if target.name != "npz":
        return surveyed(open_model(path))
    model = _npz(path)
    found = survey(model, model.tensors, has_channels=False)
    if model.nbytes > BIG_BYTES:
        return found
    compressed = compress(stream(model), pick(CodecName.GZIP, None))
    with zipfile.ZipFile(path) as archive:
        is_packed = any(info.compress_type for info in archive.infolist())
    sizes = Bytes(model.nbytes, model.nbytes if is_packed else None, compressed.nbytes)
    return replace(found, bytes=sizes, sha256=compressed.sha256)


def _npz(path: Path) -> ModelFile:
    arrays: dict[str, Array] = {}
    with np.load(path, allow_pickle=False) as held:
        for name in held.files:
            arrays[name] = held[name]
    tensors = tuple(
        Tensor(name, "", array.shape, array.dtype, Role.OTHER, Storage(name, array.nbytes, None, array.nbytes))
        for name, array in arrays.items()
    )
    return ModelFile(path, "npz", tensors, About(), (path,), lambda tensor: arrays[tensor.name])
