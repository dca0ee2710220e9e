"""From what an ONNX tensor says of itself to where its bytes lie."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.errors import InputError, abbreviated
from prunectl.formats.base import Storage, shown
from prunectl.formats.extents import Extent
from prunectl.formats.onnx.decode import Scattered, Source
from prunectl.formats.onnx.dtypes import CODES, Code
from prunectl.formats.onnx.external import Neighbours
from prunectl.formats.onnx.proto import INT32S, INT64S, RAW, UINT64S, SparseProto, TensorProto

MAX_AXES = 64
"""NumPy's limit."""
MAX_ELEMENTS = 1 << 48
MAX_BLOWN_UP_BYTES = 128 << 20
"""A sparse tensor that unfolds to more than this, and more than BOMB_RATIO times itself, is a bomb."""
BOMB_RATIO = 200


@dataclass(frozen=True, slots=True)
class Located:
    """A tensor whose bytes are known to be there."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    storage: Storage
    source: Source | Scattered


class Locator:
    """Finds the bytes of tensors in one model."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.neighbours = Neighbours(path)

    def locate(self, proto: TensorProto | SparseProto, name: str) -> Located:
        """Return where a tensor lies, dense or sparse."""
        return self.scattered(proto, name) if isinstance(proto, SparseProto) else self.dense(proto, name)

    def dense(self, proto: TensorProto, name: str) -> Located:
        """Return where a tensor lies."""
        code = CODES.get(proto.data_type)
        if code is None:
            raise InputError(
                f"{self.path} holds {abbreviated(name)} as type {proto.data_type}, which prunectl does not read"
            )
        self._check_shape(name, proto.dims)
        empty = Source(name, proto.dims, code.dtype, code.bits, ())
        key, source = self._source(empty, proto, code)
        is_flat = not source.is_varint and len(source.runs) == 1 and code.bits >= 8
        nbytes = math.prod(proto.dims) * code.dtype.itemsize
        storage = Storage(key, nbytes, source.runs[0] if is_flat else None, source.stored_bytes)
        return Located(proto.dims, code.dtype, storage, source)

    def scattered(self, proto: SparseProto, name: str) -> Located:
        """Return where the values and the places of a sparse tensor lie."""
        values, indices = self.dense(proto.values, name), self.dense(proto.indices, f"the indices of {name}")
        self._check_shape(name, proto.dims)
        count = math.prod(values.shape)
        is_list = indices.shape in {(count,), (count, len(proto.dims))}
        if len(values.shape) != 1 or not is_list or indices.dtype.kind != "i" or indices.dtype.itemsize < 4:
            raise InputError(f"{self.path} is damaged: the indices of {abbreviated(name)} do not match its values")
        stored = values.storage.stored_bytes + indices.storage.stored_bytes
        nbytes = math.prod(proto.dims) * values.dtype.itemsize
        if nbytes > max(MAX_BLOWN_UP_BYTES, BOMB_RATIO * stored):
            raise InputError(f"{self.path} is refused: {abbreviated(name)} would unfold to {nbytes} bytes, like a bomb")
        source = Scattered(_dense(values), _dense(indices), proto.dims)
        return Located(proto.dims, values.dtype, Storage(name, nbytes, None, stored), source)

    def _source(self, empty: Source, proto: TensorProto, code: Code) -> tuple[str, Source]:
        name = empty.name
        if proto.is_segment:
            raise InputError(f"{self.path} holds {abbreviated(name)} in segments, which prunectl does not read")
        if proto.external is not None:
            extent = self.neighbours.extent(name, proto.external, empty.raw_bytes)
            # Tensors in the same place are one, but an empty one is not what begins there.
            return f"{proto.external['location']}:{extent.offset}+{extent.nbytes}", replace(empty, runs=(extent,))
        is_varint = RAW not in proto.data and code.field in {INT32S, INT64S, UINT64S}
        spans = proto.data.get(RAW) or proto.data.get(code.field, ())
        runs = tuple(Extent(self.path, begin, end - begin) for begin, end in spans if end > begin)
        source = replace(empty, runs=runs, is_varint=is_varint)
        self._check_length(source)
        return name, source

    def _check_length(self, source: Source) -> None:
        stored, expected = source.stored_bytes, source.raw_bytes
        if expected and not stored:
            raise InputError(f"{self.path} is incomplete: {abbreviated(source.name)} has a shape but no data in it")
        # A varint takes one byte to ten; how many there are is found when they are read.
        elements = math.prod(source.shape) if source.bits >= 8 else expected
        is_right = elements <= stored <= 10 * elements if source.is_varint else stored == expected
        if not is_right:
            raise InputError(
                f"{self.path} is damaged: {abbreviated(source.name)} of shape {shown(source.shape)} "
                f"does not fit its {stored} bytes"
            )

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if len(shape) > MAX_AXES or any(length < 0 for length in shape):
            raise InputError(f"{self.path} is damaged: {abbreviated(name)} has an impossible shape")
        if math.prod(length for length in shape if length) > MAX_ELEMENTS:
            raise InputError(f"{self.path} is damaged: {abbreviated(name)} has an impossible shape")


def _dense(located: Located) -> Source:
    assert isinstance(located.source, Source)
    return located.source
