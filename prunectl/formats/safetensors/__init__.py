"""Safetensors: a length, a JSON header, and one buffer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from prunectl.errors import InputError, abbreviated
from prunectl.formats import budgets, state_dict
from prunectl.formats.base import Array, ModelFile, ModelInfo, Role, Storage, Tensor, format_shape
from prunectl.formats.extents import Extent, blocks, raw_bytes
from prunectl.formats.safe_json import parse_object

LENGTH_BYTES = 8

_MAX_BITS = 63

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}


def open_model(path: Path) -> ModelFile:
    """Open a safetensors file."""
    model = open_undescribed(path)
    described = state_dict.describe(model.tensors)
    about = replace(model.about, wrappers=state_dict.wrappers(described))
    return replace(model, tensors=described, about=about)


def open_undescribed(path: Path, prefix: str = "") -> ModelFile:
    """Open a safetensors file without a look at what its names tell, with this in front of its storages' keys."""
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if header_bytes > min(budgets.MAX_SAFETENSORS_HEADER_BYTES, file_bytes - LENGTH_BYTES):
            raise InputError(f"{path} is truncated or damaged: it claims a header of {header_bytes} bytes")
        header = parse_object(file.read(header_bytes), path, "its header")
    metadata = header.pop("__metadata__", {})
    if len(header) > budgets.MAX_TENSORS:
        raise InputError(f"{path} is refused: it claims {len(header)} tensors")
    start = LENGTH_BYTES + header_bytes
    tensors = tuple(_tensor(path, name, facts, start, prefix) for name, facts in header.items())
    _check_layout(path, tensors, start, file_bytes)
    return ModelFile(path, "safetensors", tensors, ModelInfo(producer=_producer(metadata)), files=(path,))


def _producer(metadata: Any) -> str:
    return f"format {metadata['format']}" if isinstance(metadata, dict) and "format" in metadata else ""


def _tensor(path: Path, name: str, facts: Any, start: int, prefix: str) -> Tensor:
    try:
        (begin, end), shape, code = facts["data_offsets"], tuple(facts["shape"]), facts["dtype"]
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(f"{path} is damaged: its header does not say where {abbreviated(name)} lies") from error
    numbers = (begin, end, *shape)
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise InputError(f"{path} is damaged: its header does not say where {abbreviated(name)} lies")
    if len(shape) > budgets.MAX_AXES or max(numbers).bit_length() > _MAX_BITS:
        raise InputError(
            f"{path} is refused: {abbreviated(name)} claims the shape {format_shape(shape)}, beyond any memory"
        )
    dtype = DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise InputError(
            f"{path} holds {abbreviated(name)} as {abbreviated(str(code))}, a type that prunectl does not read"
        )
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise InputError(
            f"{path} is damaged: {abbreviated(name)} of shape {format_shape(shape)} does not fill bytes {begin}..{end}"
        )
    storage = Storage(f"{prefix}{name}", end - begin, Extent(path, start + begin, end - begin), end - begin)
    return Tensor(name, "", shape, dtype, Role.OTHER, storage)


def _check_layout(path: Path, tensors: Iterable[Tensor], start: int, file_bytes: int) -> None:
    at = start
    for extent, name in sorted((_extent(tensor), tensor.name) for tensor in tensors):
        if extent[0] != at:
            raise InputError(f"{path} is damaged: {abbreviated(name)} overlaps another tensor or leaves a gap")
        at += extent[1]
    if at != file_bytes:
        raise InputError(f"{path} is truncated or damaged: its tensors end at byte {at}, the file at {file_bytes}")


def _extent(tensor: Tensor) -> tuple[int, int]:
    extent = tensor.storage.extent
    return (extent.offset, extent.nbytes) if extent is not None else (0, 0)


CODES: Mapping[np.dtype[Any], str] = {dtype: code for code, dtype in DTYPES.items()}
_METADATA = "__metadata__"
_ROUND_BYTES = 8


def read(path: Path) -> dict[str, Any]:
    """The header of a file that was opened before."""
    with path.open("rb") as file:
        return parse_object(file.read(int.from_bytes(file.read(LENGTH_BYTES), "little")), path, "its header")


def header_without_tensors(path: Path) -> dict[str, Any]:
    """A header without tensors, which says of itself what another file does."""
    old = read(path)
    return {_METADATA: old[_METADATA]} if _METADATA in old else {}


def encode_header(header: Mapping[str, Any]) -> bytes:
    """A header as it stands in a file, its length before it."""
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ROUND_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


@dataclass(frozen=True, slots=True)
class SafetensorsEntry:
    """A tensor to be written."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[Array]]
    """Its numbers, piece by piece."""


def array_entry(name: str, array: Array) -> SafetensorsEntry:
    """A tensor in memory."""
    return SafetensorsEntry(name, array.dtype, array.shape, lambda: (array,))


def unchanged_entry(tensor: Tensor, name: str) -> SafetensorsEntry:
    """A tensor of another file, perhaps by another name."""
    extent = tensor.storage.extent
    return SafetensorsEntry(
        name, tensor.dtype, tensor.shape, lambda: blocks(extent, tensor.dtype) if extent is not None else ()
    )


def write_entries(path: Path, header: dict[str, Any], entries: Sequence[SafetensorsEntry]) -> None:
    """Write a file of tensors in this order, a block in memory at a time; the header has what else stands in it."""
    offset = 0
    for entry in entries:
        end = offset + math.prod(entry.shape) * entry.dtype.itemsize
        code = CODES[entry.dtype.newbyteorder("=")]
        header[entry.name] = {"dtype": code, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    with path.open("xb") as file:
        file.write(encode_header(header))
        for entry in entries:
            for block in entry.blocks():
                file.write(raw_bytes(block))
