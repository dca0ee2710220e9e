"""Elements of ONNX tensors that do not lie flat: varints, half bytes, values without their zeros."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunectl.errors import InputError, abbreviated
from prunectl.formats import protobuf
from prunectl.formats.base import Array, format_shape
from prunectl.formats.extents import Extent


@dataclass(frozen=True, slots=True)
class TensorSource:
    """What the elements of a tensor are made from."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    bits: int
    """Bits of one element as it is stored raw."""
    runs: tuple[Extent, ...]
    is_varint: bool = False

    @property
    def stored_bytes(self) -> int:
        """Bytes that it takes in the file."""
        return sum(run.nbytes for run in self.runs)

    @property
    def raw_bytes(self) -> int:
        """Bytes that its elements take raw: less than a byte each, some of them."""
        return (math.prod(self.shape) * self.bits + 7) // 8


@dataclass(frozen=True, slots=True)
class SparseSource:
    """A tensor stored without its zeros."""

    values: TensorSource
    indices: TensorSource
    shape: tuple[int, ...]


def decode_dense(source: TensorSource, path: Path) -> Array:
    """Return the elements of a tensor."""
    raw = b"".join(_read(run) for run in source.runs)
    stored = np.frombuffer(raw, np.uint8)
    if source.is_varint:
        stored = _narrowed(raw, source, path)
    if stored.size != source.raw_bytes:
        raise InputError(
            f"{path} is damaged: {abbreviated(source.name)} of shape {format_shape(source.shape)} "
            "does not fill its data"
        )
    if source.bits < 8:
        stored = _unpacked(stored, source)
    array = stored.view(source.dtype).reshape(source.shape)
    array.flags.writeable = False
    return array


def decode_sparse(source: SparseSource, path: Path) -> Array:
    """Return a tensor with its zeros put back."""
    values, indices = decode_dense(source.values, path), decode_dense(source.indices, path)
    array = np.zeros(source.shape, values.dtype)
    flat = indices
    if indices.ndim == 2:
        # Indices of each axis; those out of range are caught below, where -1 stands for them.
        is_inside = ((indices >= 0) & (indices < np.array(source.shape))).all(axis=1)
        steps = np.array([math.prod(source.shape[axis + 1 :]) for axis in range(len(source.shape))], np.int64)
        flat = np.where(is_inside, (indices * steps).sum(axis=1), -1)
    if flat.size and (flat.min() < 0 or flat.max() >= array.size):
        raise InputError(
            f"{path} is damaged: {abbreviated(source.values.name)} has a value outside its shape "
            f"{format_shape(source.shape)}"
        )
    array.reshape(-1)[flat] = values
    array.flags.writeable = False
    return array


def _read(run: Extent) -> bytes:
    try:
        with run.path.open("rb") as file:
            file.seek(run.offset)
            raw = file.read(run.nbytes)
    except OSError as error:
        raise InputError(f"{run.path} cannot be read: {error.strerror}") from error
    if len(raw) != run.nbytes:
        raise InputError(f"{run.path} ended early: it became shorter while it was read")
    return raw


def _narrowed(raw: bytes, source: TensorSource, path: Path) -> NDArray[np.uint8]:
    try:
        numbers = protobuf.varints(raw)
    except protobuf.WireError as error:
        raise InputError(f"{path} is damaged: {abbreviated(source.name)} holds {error}") from error
    width = 1 if source.bits < 8 else source.dtype.itemsize
    return numbers.astype(f"u{width}").view(np.uint8)


def _unpacked(stored: NDArray[np.uint8], source: TensorSource) -> NDArray[np.uint8]:
    """Spread elements of 2 or 4 bits over a byte each, the lowest bits first."""
    shifts = np.arange(0, 8, source.bits, dtype=np.uint8)
    mask = np.uint8((1 << source.bits) - 1)
    elements = ((stored[:, None] >> shifts) & mask).reshape(-1)[: math.prod(source.shape)]
    if source.dtype.name.startswith("int"):
        sign = np.uint8(1 << (source.bits - 1))
        elements = (elements ^ sign) - sign
    return elements
