"""The numbers of a model that count, once each."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from prunectl.errors import InputError, UsageError, WorkError
from prunectl.exporting.job import ExportJob
from prunectl.exporting.request import ExportRequest
from prunectl.formats.base import WEIGHTS, Array, ModelFile, Tensor
from prunectl.formats.safetensors import CODES, encode_header, open_model

_LARGEST = {"float16": 65504.0, "bfloat16": 3.3895e38}


def chosen(model: ModelFile) -> tuple[Tensor, ...]:
    """Return the tensors that a trained model needs, without those that the file holds a second time."""
    found = tuple(tensor for tensor in model.tensors if tensor.role in WEIGHTS and tensor.name not in model.copies)
    if not found:
        raise InputError(f"{model.path} holds no weights")
    return found


def arrays(job: ExportJob) -> Iterator[tuple[Tensor, Array]]:
    """Yield tensors with the numbers that are written for them."""
    for tensor in chosen(job.file):
        yield tensor, written(job, tensor)


def written(job: ExportJob, tensor: Tensor) -> Array:
    """Return the numbers of a tensor as they are written."""
    return narrowed(job.request, tensor.name, job.file.read(tensor))


def dtype_of(job: ExportJob, tensor: Tensor) -> np.dtype[Any]:
    """Return the type in which a tensor is written."""
    return _narrow(job.request, tensor.dtype)


def narrowed(request: ExportRequest, name: str, array: Array) -> Array:
    """Return numbers as they are written: with --half or --bf16, wider floats become those of 16 bits."""
    dtype = _narrow(request, array.dtype)
    if dtype == array.dtype:
        return array
    with np.errstate(over="ignore"):
        found = array.astype(dtype)
    if not np.isfinite(found.astype(np.float32)).all() and np.isfinite(array).all():
        largest = _LARGEST[dtype.name]
        raise WorkError(f"{name} holds numbers beyond {largest:.5g}, which {dtype.name} does not hold")
    return found


def _narrow(request: ExportRequest, dtype: np.dtype[Any]) -> np.dtype[Any]:
    is_wide = dtype.kind == "f" and dtype.itemsize > 2
    if is_wide and request.is_half:
        return np.dtype(np.float16)
    return np.dtype(ml_dtypes.bfloat16) if is_wide and request.is_bf16 else dtype


def same_bits(one: Array, other: Array) -> bool:
    """Whether two arrays hold the same numbers to the bit."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return np.ascontiguousarray(one).tobytes() == np.ascontiguousarray(other).tobytes()


def check_types(job: ExportJob, allowed: frozenset[str], title: str) -> None:
    """Refuse numbers that a format has no type for."""
    for tensor in chosen(job.file):
        name = dtype_of(job, tensor).name
        if name not in allowed:
            raise UsageError(f"{tensor.name} is {name}, and {title} has no such type")


@dataclass(frozen=True, slots=True)
class ExportedEntry:
    """A tensor that is read when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], Array]


def write(entries: Sequence[ExportedEntry], metadata: Mapping[str, str], target: Path) -> None:
    """Write a file, one tensor in memory at a time."""
    ordered = sorted(entries, key=lambda one: (-one.dtype.itemsize, one.name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    at = 0
    for one in ordered:
        end = at + int(np.prod(one.shape, dtype=np.int64)) * one.dtype.itemsize
        header[one.name] = {
            "dtype": CODES[one.dtype.newbyteorder("=")],
            "shape": list(one.shape),
            "data_offsets": [at, end],
        }
        at = end
    with target.open("xb") as file:
        file.write(encode_header(header))
        for one in ordered:
            file.write(np.ascontiguousarray(one.read()).tobytes())


def save(arrays: Sequence[tuple[str, Array]], metadata: Mapping[str, str], target: Path) -> None:
    """Write arrays that are in memory."""
    write([_header_entry(name, array) for name, array in arrays], metadata, target)


def _header_entry(name: str, array: Array) -> ExportedEntry:
    return ExportedEntry(name, array.shape, array.dtype, lambda: array)


_PLAIN = frozenset(np.dtype(code).name for code in "?bhiqBHIQefdFD")
_LONG_AGO = (1980, 1, 1, 0, 0, 0)
_FRAMEWORKS = {"torch": "pt", "torch-legacy": "pt", "torch-tar": "pt", "torch-export": "pt", "shards": "pt"}


def write_safetensors(job: ExportJob, target: Path) -> tuple[str, ...]:
    """Write a safetensors file, wide numbers first and then by name."""
    check_types(job, frozenset(dtype.name for dtype in CODES), "safetensors")
    said = {"format": _FRAMEWORKS[job.file.format]} if job.file.format in _FRAMEWORKS else {}
    write([_array_entry(job, tensor) for tensor in chosen(job.file)], {**said, **dict(job.request.metadata)}, target)
    found = open_model(target)
    _compare(job, {tensor.name: found.read(tensor) for tensor in found.tensors})
    return _remarks(job)


def _array_entry(job: ExportJob, tensor: Tensor) -> ExportedEntry:
    return ExportedEntry(tensor.name, tensor.shape, dtype_of(job, tensor), lambda: written(job, tensor))


def write_npz(job: ExportJob, target: Path) -> tuple[str, ...]:
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


def _compare(job: ExportJob, found: dict[str, Array]) -> None:
    expected = {tensor.name for tensor in chosen(job.file)}
    if expected != found.keys():
        raise WorkError(f"{min(expected ^ found.keys())} came out wrong; nothing was written")
    for tensor, array in arrays(job):
        # A scalar may come back as an array of one.
        if not same_bits(np.asarray(array), found[tensor.name].reshape(array.shape)):
            raise WorkError(f"{tensor.name} came out with other numbers than it has; nothing was written")


def _remarks(job: ExportJob) -> tuple[str, ...]:
    keys = [tensor.storage.key for tensor in chosen(job.file)]
    tied = len(keys) - len(set(keys))
    left = len(job.file.tensors) - len(keys)
    found: list[str] = []
    if tied:
        found.append(f"{tied} tensors share their bytes with others in the source; here each has its own.")
    if left:
        found.append(f"{left} tensors that predictions do not need, or that are held twice, were left out.")
    return tuple(found)
