"""Weights alone, from any format, by bytes and without a framework."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from prunectl.errors import WorkError
from prunectl.exporting import safetensors
from prunectl.exporting.job import Job
from prunectl.exporting.weights import arrays, check_types, chosen, dtype_of, same_bits, written
from prunectl.formats.base import Array, Tensor
from prunectl.formats.safetensors import open_model
from prunectl.formats.safetensors_header import CODES

_PLAIN = frozenset(np.dtype(code).name for code in "?bhiqBHIQefdFD")
_LONG_AGO = (1980, 1, 1, 0, 0, 0)
_FRAMEWORKS = {"torch": "pt", "torch-legacy": "pt", "torch-tar": "pt", "torch-export": "pt", "shards": "pt"}


def write_safetensors(job: Job, target: Path) -> tuple[str, ...]:
    """Write a safetensors file, wide numbers first and then by name."""
    check_types(job, frozenset(dtype.name for dtype in CODES), "safetensors")
    said = {"format": _FRAMEWORKS[job.file.format]} if job.file.format in _FRAMEWORKS else {}
    safetensors.write(
        [_entry(job, tensor) for tensor in chosen(job.file)], {**said, **dict(job.request.metadata)}, target
    )
    found = open_model(target)
    _compare(job, {tensor.name: found.read(tensor) for tensor in found.tensors})
    return _remarks(job)


def _entry(job: Job, tensor: Tensor) -> safetensors.Entry:
    return safetensors.Entry(tensor.name, tensor.shape, dtype_of(job, tensor), lambda: written(job, tensor))


def write_npz(job: Job, target: Path) -> tuple[str, ...]:
    """Write an archive of NumPy arrays without times; packed, its entries are deflated."""
    check_types(job, _PLAIN, "npz")
    how = zipfile.ZIP_DEFLATED if job.request.is_packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(target, "x") as archive:
        for tensor, array in sorted(arrays(job), key=lambda pair: pair[0].name):
            entry = zipfile.ZipInfo(f"{tensor.name}.npy", _LONG_AGO)
            entry.compress_type = how
            with archive.open(entry, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
    with np.load(target, allow_pickle=False) as found:
        _compare(job, {name: found[name] for name in found.files})
    return _remarks(job)


def _compare(job: Job, found: dict[str, Array]) -> None:
    expected = {tensor.name for tensor in chosen(job.file)}
    if expected != found.keys():
        raise WorkError(f"{min(expected ^ found.keys())} came out wrong; nothing was written")
    for tensor, array in arrays(job):
        # A scalar may come back as an array of one.
        if not same_bits(np.asarray(array), found[tensor.name].reshape(array.shape)):
            raise WorkError(f"{tensor.name} came out with other numbers than it has; nothing was written")


def _remarks(job: Job) -> tuple[str, ...]:
    keys = [tensor.storage.key for tensor in chosen(job.file)]
    tied = len(keys) - len(set(keys))
    left = len(job.file.tensors) - len(keys)
    found: list[str] = []
    if tied:
        found.append(f"{tied} tensors share their bytes with others in the source; here each has its own.")
    if left:
        found.append(f"{left} tensors that predictions do not need, or that are held twice, were left out.")
    return tuple(found)
