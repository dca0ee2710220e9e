"""A format that prunectl reads once this package is installed: weights in NumPy's `.npz`, without pickle.

Copy this folder, change the two functions, and `pip install .`: then `prunectl inspect`, `size`, `diff` and all else
that only reads take such files. prunectl asks `is_npz` about files that none of its own formats claims, and runs both
functions in a child process: what a hostile file does to them is one sentence for the user.
"""

from __future__ import annotations

import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from prunectl.formats.base import Format, ModelFile, ModelInfo, Role, Storage, Tensor
from prunectl.formats.detect import FileProbe

_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_NUMBERS = "biufc"


def is_npz(probe: FileProbe) -> bool:
    """Whether a file is a zip of arrays: its head, its size and the names in a zip are at hand."""
    return bool(probe.entries) and all(name.endswith(".npy") for name in probe.entries)


def open_npz(path: Path) -> ModelFile:
    """The arrays of an archive as tensors; texts among them are left out."""
    with zipfile.ZipFile(path) as archive:
        tensors = [_tensor(archive, entry) for entry in archive.infolist()]
        is_compressed = any(entry.compress_type for entry in archive.infolist())
    tensors = [tensor for tensor in tensors if tensor.dtype.kind in _NUMBERS]
    about = ModelInfo(producer="numpy", is_compressed=is_compressed)
    return ModelFile(path, "npz", tuple(tensors), about, (path,), partial(_read, path))


def _tensor(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Tensor:
    with archive.open(entry) as file:
        shape, _, dtype = _HEADERS[npy.read_magic(file)](file)
    if dtype.hasobject:
        raise ValueError(f"{entry.filename} holds Python objects, which only pickle reads")
    name = entry.filename.removesuffix(".npy")
    role = Role.KERNEL if len(shape) >= 2 else Role.OTHER
    storage = Storage(name, dtype.itemsize * int(np.prod(shape)), None, entry.compress_size)
    return Tensor(name, name.rpartition("/")[0] or name, shape, dtype, role, storage, out_axis=len(shape) - 1)


def _read(path: Path, tensor: Tensor) -> np.ndarray[Any, Any]:
    with np.load(path, allow_pickle=False) as archive:
        array: np.ndarray[Any, Any] = archive[tensor.name]
        return array


NPZ = Format("npz", "NumPy archive", (".npz",), is_npz, open_npz)
