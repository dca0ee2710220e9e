"""Targets that hold only weights (safetensors, npz), compared bit by bit with the source."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import starmap
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from prunectl.errors import InputError, UsageError, WorkError
from prunectl.exporting.job import ExportJob
from prunectl.exporting.request import ExportRequest
from prunectl.formats.base import WEIGHTS, Array, Family, ModelFile, Tensor
from prunectl.formats.registry import by_name
from prunectl.formats.safetensors import CODES, SafetensorsEntry, array_entry, by_width, open_model, write_entries
from prunectl.formats.state_dict import MODEL_ROOTS
from prunectl.formats.zip_write import EPOCH

_LARGEST = {"float16": 65504.0, "bfloat16": 3.3895e38}


def exported_tensors(model: ModelFile) -> tuple[Tensor, ...]:
    """The tensors needed for inference, without duplicates, under the names that the model's class loads."""
    tensors = _weights(model)
    if not tensors:
        raise InputError(f"{model.path} holds no weights")
    entry = _entry_prefix(model, tensors)
    return tuple(replace(tensor, name=tensor.name.removeprefix(entry)) for tensor in tensors) if entry else tensors


def _weights(model: ModelFile) -> tuple[Tensor, ...]:
    return tuple(tensor for tensor in model.tensors if tensor.role in WEIGHTS and tensor.name not in model.duplicates)


def _entry_prefix(model: ModelFile, tensors: Sequence[Tensor]) -> str:
    """Name prefix of the checkpoint entry that holds all tensors, such as `state_dict.`; empty if there is none.

    Names of layers do not include it, unlike a module of the same name. Checkpoints written by several ranks are read
    without it.
    """
    if by_name(model.format).is_of_ranks:
        return ""
    root = f"{tensors[0].name.partition('.')[0]}." if tensors else ""
    if root[:-1] not in MODEL_ROOTS or not all(tensor.name.startswith(root) for tensor in tensors):
        return ""
    return root if any(tensor.layer and tensor.name.startswith(f"{root}{tensor.layer}.") for tensor in tensors) else ""


def exported_arrays(job: ExportJob) -> Iterator[tuple[Tensor, Array]]:
    """Yield tensors with their arrays, cast to the dtype in which they are written."""
    for tensor in exported_tensors(job.file):
        yield tensor, cast_tensor(job, tensor)


def cast_tensor(job: ExportJob, tensor: Tensor) -> Array:
    """The array of a tensor, cast to the dtype in which it is written."""
    return cast_down(job.request, tensor.name, job.file.read(tensor))


def exported_dtype(job: ExportJob, tensor: Tensor) -> np.dtype[Any]:
    """The dtype in which a tensor is written."""
    return _narrow_dtype(job.request, tensor.dtype)


def cast_down(request: ExportRequest, name: str, array: Array) -> Array:
    """Cast floats to 16 bits with --half or --bf16; overflow to infinity is refused."""
    dtype = _narrow_dtype(request, array.dtype)
    if dtype == array.dtype:
        return array
    with np.errstate(over="ignore"):
        narrow = array.astype(dtype)
    if not np.isfinite(narrow.astype(np.float32)).all() and np.isfinite(array).all():
        largest = _LARGEST[dtype.name]
        raise WorkError(f"{name} has values beyond {largest:.5g}, the largest that {dtype.name} can hold")
    return narrow


def _narrow_dtype(request: ExportRequest, dtype: np.dtype[Any]) -> np.dtype[Any]:
    is_wide = dtype.kind == "f" and dtype.itemsize > 2
    if is_wide and request.half:
        return np.dtype(np.float16)
    return np.dtype(ml_dtypes.bfloat16) if is_wide and request.bf16 else dtype


def _same_bits(first: Array, second: Array) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return np.ascontiguousarray(first).tobytes() == np.ascontiguousarray(second).tobytes()


def check_types(job: ExportJob, allowed: frozenset[str], title: str) -> None:
    """Refuse tensors whose dtype a format lacks."""
    for tensor in exported_tensors(job.file):
        name = exported_dtype(job, tensor).name
        if name not in allowed:
            raise UsageError(f"{tensor.name} has the type {name}, which {title} does not support")


def save_arrays(arrays: Sequence[tuple[str, Array]], metadata: Mapping[str, str], target: Path) -> None:
    """Write a safetensors file of arrays in memory."""
    _save(starmap(array_entry, arrays), dict(sorted(metadata.items())), target)


def save_tensors(job: ExportJob, tensors: Iterable[Tensor], metadata: Mapping[str, str], target: Path) -> None:
    """Write a safetensors file, with one tensor in memory at a time."""
    _save((_entry(job, tensor) for tensor in tensors), metadata, target)


def _entry(job: ExportJob, tensor: Tensor) -> SafetensorsEntry:
    return SafetensorsEntry(tensor.name, exported_dtype(job, tensor), tensor.shape, lambda: (cast_tensor(job, tensor),))


def _save(entries: Iterable[SafetensorsEntry], metadata: Mapping[str, str], target: Path) -> None:
    """Write a safetensors file, sorted by item size and then by name."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    write_entries(target, header, sorted(entries, key=by_width))


_NUMPY_DTYPES = frozenset(np.dtype(code).name for code in "?bhiqBHIQefdFD")
_OF_TORCH = frozenset({Family.TORCH, Family.TORCH_PROGRAM, Family.SAFETENSORS})


def write_safetensors(job: ExportJob, target: Path) -> tuple[str, ...]:
    """Export to safetensors."""
    check_types(job, frozenset(CODES), "safetensors")
    metadata = {"format": "pt"} if job.file.family in _OF_TORCH or by_name(job.file.format).is_of_ranks else {}
    metadata |= dict(job.request.metadata)
    save_tensors(job, exported_tensors(job.file), dict(sorted(metadata.items())), target)
    result = open_model(target)
    written = {tensor.name: tensor for tensor in result.tensors}
    check_equal(job, exported_tensors(job.file), written, lambda name: result.read(written[name]))
    return _notes(job)


def write_npz(job: ExportJob, target: Path) -> tuple[str, ...]:
    """Export to an npz archive without timestamps; packed, its entries are deflated."""
    check_types(job, _NUMPY_DTYPES, "npz")
    compression = zipfile.ZIP_DEFLATED if job.request.pack else zipfile.ZIP_STORED
    with zipfile.ZipFile(target, "x") as archive:
        for tensor, array in sorted(exported_arrays(job), key=lambda pair: pair[0].name):
            entry = zipfile.ZipInfo(f"{tensor.name}.npy", EPOCH)
            entry.compress_type = compression
            with archive.open(entry, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
    with np.load(target, allow_pickle=False) as result:
        check_equal(job, exported_tensors(job.file), result.files, result.__getitem__)
    return _notes(job)


def check_equal(job: ExportJob, tensors: Iterable[Tensor], names: Iterable[str], read: Callable[[str], Array]) -> None:
    """Read every tensor back from the output, and compare its bits."""
    expected = {tensor.name: tensor for tensor in tensors}
    if mismatched := expected.keys() ^ set(names):
        raise WorkError(f"{min(mismatched)} is missing or unexpected in the output; nothing was written")
    for name, tensor in expected.items():
        array = np.asarray(cast_tensor(job, tensor))
        # A scalar may be read back as an array of one element.
        if not _same_bits(array, read(name).reshape(array.shape)):
            raise WorkError(f"{name} has different values in the output; nothing was written")


def _notes(job: ExportJob) -> tuple[str, ...]:
    keys = [tensor.storage.key for tensor in exported_tensors(job.file)]
    tied = len(keys) - len(set(keys))
    omitted = len(job.file.tensors) - len(keys)
    entry = _entry_prefix(job.file, _weights(job.file))
    notes = [f"Tensors are named without {entry[:-1]}, the entry of the checkpoint that holds them."] if entry else []
    if tied:
        shared = "1 tensor shares its bytes" if tied == 1 else f"{tied} tensors share their bytes"
        notes.append(f"{shared} with others in the source; in the output each has its own.")
    if omitted:
        singular = "1 tensor was left out, because inference does not need it or it is a duplicate"
        plural = f"{omitted} tensors were left out, because inference does not need them or they are duplicates"
        notes.append(f"{singular if omitted == 1 else plural}.")
    return tuple(notes)
