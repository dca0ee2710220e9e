"""ONNX tensors: locate their bytes, and decode those that are not flat (varints, elements below a byte, sparse)."""

from __future__ import annotations

import math
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import ml_dtypes
import numpy as np

from prunectl.errors import InputError, abbreviated, reading
from prunectl.formats import budgets, protobuf
from prunectl.formats.base import Array, Storage, format_shape
from prunectl.formats.extents import Extent, check_inside, unpack
from prunectl.formats.onnx.messages import (
    DOUBLES,
    FLOATS,
    INT32S,
    INT64S,
    RAW,
    UINT64S,
    NodeProto,
    SparseProto,
    TensorProto,
)

STRING = 8


@dataclass(frozen=True, slots=True)
class Code:
    """An element type of ONNX."""

    dtype: np.dtype[Any]
    field: int
    """The field of a TensorProto that holds such elements, unless they are raw."""
    bits: int
    """Bits of a raw element."""


def _code(kind: Any, field: int = INT32S, bits: int = 0) -> Code:
    dtype = np.dtype(kind)
    return Code(dtype, field, bits or dtype.itemsize * 8)


CODES: dict[int, Code] = {
    1: _code(np.float32, FLOATS),
    2: _code(np.uint8),
    3: _code(np.int8),
    4: _code(np.uint16),
    5: _code(np.int16),
    6: _code(np.int32),
    7: _code(np.int64, INT64S),
    9: _code(np.bool_),
    10: _code(np.float16),
    11: _code(np.float64, DOUBLES),
    12: _code(np.uint32, UINT64S),
    13: _code(np.uint64, UINT64S),
    14: _code(np.complex64, FLOATS),
    15: _code(np.complex128, DOUBLES),
    16: _code(ml_dtypes.bfloat16),
    17: _code(ml_dtypes.float8_e4m3fn),
    18: _code(ml_dtypes.float8_e4m3fnuz),
    19: _code(ml_dtypes.float8_e5m2),
    20: _code(ml_dtypes.float8_e5m2fnuz),
    21: _code(ml_dtypes.uint4, bits=4),
    22: _code(ml_dtypes.int4, bits=4),
    23: _code(ml_dtypes.float4_e2m1fn, bits=4),
    24: _code(ml_dtypes.float8_e8m0fnu),
    25: _code(ml_dtypes.uint2, bits=2),
    26: _code(ml_dtypes.int2, bits=2),
}


_MAX_DIGITS = 19


class ExternalFiles:
    """The external data files of a model; InputError for files outside its folder."""

    def __init__(self, model: Path) -> None:
        self._model = model
        self._sizes: dict[str, int] = {}

    @property
    def files(self) -> tuple[Path, ...]:
        """The external data files of the tensors located so far."""
        return tuple(self._model.parent / location for location in self._sizes)

    def extent(self, name: str, facts: Mapping[str, str], nbytes: int) -> Extent:
        """The bytes of a tensor in its external data file; InputError if the file does not contain them."""
        location = facts.get("location", "")
        if location not in self._sizes:
            self._sizes[location] = self._size(location)
        offset = self._number(name, facts.get("offset", "0"))
        length = self._number(name, facts.get("length", str(nbytes)))
        if length != nbytes:
            raise InputError(
                f"{self._model} is damaged: {abbreviated(name)} needs {nbytes} bytes; its external data has {length}"
            )
        path = self._model.parent / location
        check_inside(path, offset, nbytes, self._sizes[location], f"{name} of {self._model.name}")
        return Extent(path, offset, nbytes)

    def _number(self, name: str, text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS):
            raise InputError(
                f"{self._model} is damaged: the offset of {abbreviated(name)} in its external data is not a number"
            )
        return int(text)

    def _size(self, location: str) -> int:
        if not location or "\0" in location:
            raise InputError(f"{self._model} is damaged: its external data has no file name")
        outside = f"{self._model} is refused: its external data points outside its folder ({location})"
        windows = PureWindowsPath(location)
        if PurePosixPath(location).is_absolute() or windows.anchor or ".." in windows.parts:
            raise InputError(outside)
        path = self._model.parent / location
        try:
            # In a cache of models, the model and its data may be links to files in one other folder.
            homes = {self._model.parent.resolve(), self._model.resolve().parent}
            if not any(path.resolve().is_relative_to(home) for home in homes):
                raise InputError(outside)
            facts = path.stat()
        except FileNotFoundError as error:
            raise InputError(f"{self._model} is incomplete: its external data file {path} is missing") from error
        except (OSError, RuntimeError) as error:
            raise InputError(f"{self._model} is incomplete: its external data file {path} cannot be read") from error
        if not stat.S_ISREG(facts.st_mode):
            raise InputError(f"{self._model} is refused: its external data {path} is not a file")
        return facts.st_size


def refuse_overlaps(model: Path, extents: Iterable[tuple[str, Extent]]) -> None:
    """Refuse tensors that overlap partly; two tensors may share either all of their bytes or none."""
    last: dict[Path, tuple[int, int]] = {}
    for name, extent in sorted(extents, key=lambda item: (item[1].offset, item[1].nbytes)):
        begin, end = last.get(extent.path, (0, 0))
        this = (extent.offset, extent.offset + extent.nbytes)
        if extent.nbytes and this != (begin, end):
            if extent.offset < end:
                raise InputError(
                    f"{model} is damaged: {abbreviated(name)} overlaps another tensor in {extent.path.name}"
                )
            last[extent.path] = this


@dataclass(frozen=True, slots=True)
class Located:
    """A tensor with the location of its bytes, which were checked to exist."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    storage: Storage
    source: TensorSource | SparseSource


class TensorLocator:
    """Locates the bytes of the tensors of one model."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.neighbours = ExternalFiles(path)

    def locate(self, proto: TensorProto | SparseProto, name: str) -> Located:
        """Locate a dense or sparse tensor."""
        return self.sparse(proto, name) if isinstance(proto, SparseProto) else self.dense(proto, name)

    def dense(self, proto: TensorProto, name: str) -> Located:
        """Locate a dense tensor."""
        code = CODES.get(proto.data_type)
        if code is None:
            raise InputError(
                f"{self.path} holds {abbreviated(name)} as type {proto.data_type}, which prunectl does not read"
            )
        self._check_shape(name, proto.dims)
        empty = TensorSource(name, proto.dims, code.dtype, code.bits, ())
        key, source = self._source(empty, proto, code)
        is_flat = not source.is_varint and len(source.runs) == 1 and code.bits >= 8
        nbytes = math.prod(proto.dims) * code.dtype.itemsize
        storage = Storage(key, nbytes, source.runs[0] if is_flat else None, source.stored_bytes)
        return Located(proto.dims, code.dtype, storage, source)

    def sparse(self, proto: SparseProto, name: str) -> Located:
        """Locate the values and the indices of a sparse tensor."""
        values, indices = self.dense(proto.values, name), self.dense(proto.indices, f"the indices of {name}")
        self._check_shape(name, proto.dims)
        count = math.prod(values.shape)
        is_list = indices.shape in {(count,), (count, len(proto.dims))}
        if len(values.shape) != 1 or not is_list or indices.dtype.kind != "i" or indices.dtype.itemsize < 4:
            raise InputError(f"{self.path} is damaged: the indices of {abbreviated(name)} do not match its values")
        stored = values.storage.stored_bytes + indices.storage.stored_bytes
        nbytes = math.prod(proto.dims) * values.dtype.itemsize
        if nbytes > max(budgets.MAX_UNFOLDED_TENSOR_BYTES, budgets.BOMB_RATIO * stored):
            raise InputError(
                f"{self.path} is refused: {abbreviated(name)} would expand to {nbytes} bytes, like a zip bomb"
            )
        source = SparseSource(_dense(values), _dense(indices), proto.dims)
        return Located(proto.dims, values.dtype, Storage(name, nbytes, None, stored), source)

    def _source(self, empty: TensorSource, proto: TensorProto, code: Code) -> tuple[str, TensorSource]:
        name = empty.name
        if proto.is_segment:
            raise InputError(f"{self.path} holds {abbreviated(name)} in segments, which prunectl does not read")
        if proto.external is not None:
            extent = self.neighbours.extent(name, proto.external, empty.raw_bytes)
            # Tensors with the same bytes share a storage. The length distinguishes them from an empty one there.
            return f"{proto.external['location']}:{extent.offset}+{extent.nbytes}", replace(empty, runs=(extent,))
        is_varint = RAW not in proto.data and code.field in {INT32S, INT64S, UINT64S}
        spans = proto.data.get(RAW) or proto.data.get(code.field, ())
        runs = tuple(Extent(self.path, begin, end - begin) for begin, end in spans if end > begin)
        source = replace(empty, runs=runs, is_varint=is_varint)
        self._check_length(source)
        return name, source

    def _check_length(self, source: TensorSource) -> None:
        stored, expected = source.stored_bytes, source.raw_bytes
        if expected and not stored:
            raise InputError(f"{self.path} is incomplete: {abbreviated(source.name)} has a shape but no data in it")
        # A varint takes one to ten bytes; the exact number of elements is checked when they are decoded.
        elements = math.prod(source.shape) if source.bits >= 8 else expected
        is_right = elements <= stored <= 10 * elements if source.is_varint else stored == expected
        if not is_right:
            raise InputError(
                f"{self.path} is damaged: {abbreviated(source.name)} of shape {format_shape(source.shape)} "
                f"does not match its {stored} bytes"
            )

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        is_short = len(shape) <= budgets.MAX_AXES and all(length >= 0 for length in shape)
        if not is_short or math.prod(length for length in shape if length) > budgets.MAX_ELEMENTS:
            raise InputError(f"{self.path} is damaged: {abbreviated(name)} has an impossible shape")


def _dense(located: Located) -> TensorSource:
    assert isinstance(located.source, TensorSource)
    return located.source


_FLOAT = 1


def constant(node: NodeProto) -> TensorProto | SparseProto | None:
    """The array of a Constant node, named like its output; None for a scalar.

    None also for `value_ints`, because such lists are shapes, axes and pads.
    """
    if node.op != "Constant" or not node.outputs:
        return None
    for name, attribute in node.attributes.items():
        if name == "value" and attribute.tensor is not None and attribute.tensor.dims:
            return replace(attribute.tensor, name=node.outputs[0])
        if name == "sparse_value" and attribute.sparse is not None:
            return replace(attribute.sparse, values=replace(attribute.sparse.values, name=node.outputs[0]))
        if name == "value_floats":
            nbytes = sum(end - begin for begin, end in attribute.floats)
            return TensorProto(node.outputs[0], (nbytes // 4,), _FLOAT, {FLOATS: attribute.floats})
    return None


@dataclass(frozen=True, slots=True)
class TensorSource:
    """The stored form of a dense tensor, from which its elements are decoded."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    bits: int
    """Bits of a raw element."""
    runs: tuple[Extent, ...]
    """Where the elements lie: several runs if the file splits a repeated field."""
    is_varint: bool = False

    @property
    def stored_bytes(self) -> int:
        """Bytes in the file."""
        return sum(run.nbytes for run in self.runs)

    @property
    def raw_bytes(self) -> int:
        """Bytes of the elements in raw form, in which some dtypes take less than a byte each."""
        return (math.prod(self.shape) * self.bits + 7) // 8


@dataclass(frozen=True, slots=True)
class SparseSource:
    """The stored form of a sparse tensor."""

    values: TensorSource
    indices: TensorSource
    shape: tuple[int, ...]


def decode_dense(source: TensorSource, path: Path) -> Array:
    """Decode a dense tensor."""
    stored = _stored_elements(source, path)
    if stored.size != source.raw_bytes:
        raise InputError(
            f"{path} is damaged: {abbreviated(source.name)} of shape {format_shape(source.shape)} "
            "does not match the length of its data"
        )
    array = stored.view(source.dtype) if source.bits >= 8 else unpack(stored, source.dtype, source.bits)
    array = array[: math.prod(source.shape)].reshape(source.shape)
    array.flags.writeable = False
    return array


def _stored_elements(source: TensorSource, path: Path) -> Array:
    """The elements in raw form, as bytes."""
    if not source.is_varint:
        return np.frombuffer(_joined(source), np.uint8)
    width = 1 if source.bits < 8 else source.dtype.itemsize
    try:
        return protobuf.varints(_joined(source)).astype(f"u{width}", copy=False).view(np.uint8)
    except protobuf.WireError as error:
        raise InputError(f"{path} is damaged: {abbreviated(source.name)} holds {error}") from error


def decode_sparse(source: SparseSource, path: Path) -> Array:
    """Decode a sparse tensor to a dense one."""
    values, indices = decode_dense(source.values, path), decode_dense(source.indices, path)
    array = np.zeros(source.shape, values.dtype)
    flat = indices
    if indices.ndim == 2:
        # One index for each axis; an index out of range becomes -1, which is refused below.
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


def _joined(source: TensorSource) -> bytes:
    return b"".join(_read(run) for run in source.runs)


def _read(run: Extent) -> bytes:
    with reading(run.path), run.path.open("rb") as file:
        file.seek(run.offset)
        raw = file.read(run.nbytes)
    if len(raw) != run.nbytes:
        raise InputError(f"{run.path} was truncated while prunectl was reading it")
    return raw
