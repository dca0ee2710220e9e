"""Tensors as strided views of their storages, checked against the storages' bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.errors import InputError
from prunectl.formats.base import DtypeTable
from prunectl.formats.budgets import MAX_AXES, MAX_ELEMENTS, MAX_EXPANDED_ELEMENTS, MAX_REPEATS
from prunectl.formats.torch.pickle.opcodes import Global, OpaqueCall, Persistent, PickleDict, RawBytes, describe_value

DTYPES = DtypeTable(
    {
        "bool": np.bool_,
        "uint8": np.uint8,
        "int8": np.int8,
        "uint16": np.uint16,
        "int16": np.int16,
        "uint32": np.uint32,
        "int32": np.int32,
        "uint64": np.uint64,
        "int64": np.int64,
        "float16": np.float16,
        "float32": np.float32,
        "float64": np.float64,
        "complex64": np.complex64,
        "complex128": np.complex128,
        # Quantized tensors are read as the integers that they store.
        "qint8": np.int8,
        "quint8": np.uint8,
        "qint32": np.int32,
        # Several elements in a byte, for which NumPy has no dtype: they are read as bytes.
        "quint4x2": np.uint8,
        "quint2x4": np.uint8,
        "float4_e2m1fn_x2": np.uint8,
    },
    {
        "bfloat16": "bfloat16",
        "float8_e4m3fn": "float8_e4m3fn",
        "float8_e5m2": "float8_e5m2",
        "float8_e4m3fnuz": "float8_e4m3fnuz",
        "float8_e5m2fnuz": "float8_e5m2fnuz",
        "float8_e8m0fnu": "float8_e8m0fnu",
    },
)

STORAGES: dict[str, str] = {
    "BoolStorage": "bool",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "QInt8Storage": "qint8",
    "QUInt8Storage": "quint8",
    "QInt32Storage": "qint32",
    "QUInt4x2Storage": "quint4x2",
    "QUInt2x4Storage": "quint2x4",
    "UntypedStorage": "uint8",
}
"""The dtype of each storage class; an untyped storage counts bytes."""

SCALAR_TYPES: dict[int, str] = {
    1: "uint8",
    2: "int8",
    3: "int16",
    4: "int32",
    5: "int64",
    6: "float16",
    7: "float32",
    8: "float64",
    10: "complex64",
    11: "complex128",
    12: "bool",
    13: "bfloat16",
    28: "uint16",
    29: "float8_e4m3fn",
    30: "float8_e5m2",
    31: "float8_e4m3fnuz",
    32: "float8_e5m2fnuz",
    33: "float8_e8m0fnu",
    34: "uint32",
    35: "uint64",
}
"""The dtypes by their numbers in exported programs (`ScalarType` in torch/_export/serde/schema.py)."""


_UTILS = "torch._utils"
VIEW_CALLS = frozenset(
    {f"{_UTILS}.{name}" for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_qtensor")}
)
"""Calls that make a tensor from a storage; their first four arguments are storage, offset, shape and strides."""


@dataclass(frozen=True, slots=True)
class StorageInfo:
    """A storage as a persistent id in the pickle describes it."""

    key: str
    dtype: np.dtype[Any]
    count: int
    first: int = 0
    """Index of the first element, if the persistent id names only a part of the storage."""

    @property
    def nbytes(self) -> int:
        """Bytes that the container must hold."""
        return self.count * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class View:
    """A tensor as a view of its storage."""

    storage: StorageInfo
    dtype: np.dtype[Any]
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None


def parse_persistent_id(path: Path, key: Any) -> StorageInfo:
    """The storage that a persistent id names."""
    if not isinstance(key, tuple) or len(key) not in {5, 6} or not isinstance(key[1], Global):
        raise InputError(f"{path} is damaged: its pickle refers to an unknown storage")
    _, storage_class, name, _, count, *view = key
    if storage_class.name not in STORAGES:
        raise InputError(
            f"{path} holds numbers as {describe_value(storage_class.name)}, a type that prunectl does not read"
        )
    name = str(name) if type(name) is int else name
    if not isinstance(name, str) or not _is_count(count):
        raise InputError(f"{path} is damaged: its pickle refers to an unknown storage")
    first = 0
    if view and view[0] is not None:
        if not (isinstance(view[0], tuple) and len(view[0]) == 3 and _is_count(view[0][1]) and _is_count(view[0][2])):
            raise InputError(f"{path} is damaged: it refers to an invalid part of storage {describe_value(name)}")
        first = view[0][1]
        if first + view[0][2] > count:
            raise InputError(f"{path} is damaged: a view reaches past the end of storage {describe_value(name)}")
    return StorageInfo(name, DTYPES[STORAGES[storage_class.name]], count, first)


def view_of(path: Path, call: OpaqueCall, name: str) -> View:
    """The view that a call would rebuild, checked against its storage."""
    key, start, shape, strides = (call.arg(index) for index in range(4))
    _refuse_lazy(path, call, name)
    storage = parse_persistent_id(path, key.id if isinstance(key, Persistent) else key)
    dtype = storage.dtype
    if call.path.endswith("_v3"):
        code = call.arg(6)
        if not isinstance(code, Global) or code.name not in DTYPES:
            raise InputError(f"{path} holds {describe_value(name)} in a type of number that prunectl does not read")
        dtype = DTYPES[code.name]
    return resolve_view(path, name, storage, dtype, (start, shape, strides))


_METADATA = {"_rebuild_tensor_v2": 6, "_rebuild_tensor_v3": 7}
"""The index of the argument with a tensor's metadata, such as a lazy conjugation."""
_TYPE_TAG = "torch.jit._pickle.restore_type_tag"
"""The call in which TorchScript wraps a dictionary to record its type."""
_LAZY = {"conj": "conjugates", "neg": "negates"}


def _refuse_lazy(path: Path, call: OpaqueCall, name: str) -> None:
    """Refuse a lazily conjugated or negated tensor: `x.conj()` stores the elements of `x`."""
    index = _METADATA.get(call.path.rpartition(".")[2])
    metadata = None if index is None else call.arg(index)
    if isinstance(metadata, OpaqueCall) and metadata.path == _TYPE_TAG:
        metadata = metadata.arg(0)
    if metadata is None:
        return
    if not isinstance(metadata, PickleDict):
        raise InputError(f"{path} is damaged: the metadata of {describe_value(name)} is not a dictionary")
    flags = metadata.plain()
    for flag, verb in _LAZY.items():
        if flags.get(flag) is True:
            raise InputError(
                f"{path} stores {describe_value(name)} as a view that {verb} other numbers, which prunectl cannot read",
                hint=f"save the numbers themselves, with tensor.resolve_{flag}()",
            )


def resolve_view(
    path: Path, name: str, storage: StorageInfo, dtype: np.dtype[Any], position: tuple[Any, Any, Any]
) -> View:
    """The view of a storage with this start, shape and strides, refused if it reaches past the storage's end."""
    start, shape, strides = position
    if not (_are_counts(shape) and _are_counts(strides) and _is_count(start) and len(shape) == len(strides)):
        raise InputError(f"{path} is damaged: {describe_value(name)} has an invalid shape")
    first, rest = divmod(storage.first * storage.dtype.itemsize, dtype.itemsize)
    start += first
    size = math.prod(shape)
    elements = storage.nbytes // dtype.itemsize
    last = start + sum((length - 1) * step for length, step in zip(shape, strides, strict=True)) if size else 0
    if rest or (size and last >= elements):
        raise InputError(
            f"{path} is damaged: {describe_value(name)} reaches element {last} of its storage, which has {elements}"
        )
    is_expanded = any(step == 0 and length > 1 for length, step in zip(shape, strides, strict=True))
    if size > max(MAX_REPEATS * elements, MAX_EXPANDED_ELEMENTS if is_expanded else 0):
        raise InputError(
            f"{path} is refused: {describe_value(name)} claims {size} elements of a storage that has {elements}"
        )
    is_dense = size == 0 or _is_dense(shape, strides)
    return View(storage, dtype, start if size else 0, tuple(shape), None if is_dense else tuple(strides))


def _is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    step = 1
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1 and stride != step:
            return False
        step *= length
    return True


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_ELEMENTS


def _are_counts(values: Any) -> bool:
    if not isinstance(values, list | tuple) or len(values) > MAX_AXES:
        return False
    return all(_is_count(value) for value in values) and math.prod(value or 1 for value in values) <= MAX_ELEMENTS


CODES = frozenset({"b1", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", "c8", "c16"})


@dataclass(frozen=True, slots=True)
class FlatArray:
    """A NumPy array whose bytes lie in the pickle."""

    raw: RawBytes
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    big_endian: bool


def is_array(call: OpaqueCall) -> bool:
    """Whether a call would rebuild a NumPy array."""
    return _module(call) == "numpy" and call.path.rpartition(".")[2] in {"_reconstruct", "_frombuffer"}


def flat_array(call: OpaqueCall) -> FlatArray | None:
    """A NumPy array in the pickle; None unless its bytes are stored there as they are in memory."""
    if call.path.endswith("_frombuffer"):
        raw, kind, shape, order = (call.arg(index) for index in range(4))
        is_fortran = order == "F"
    elif isinstance(call.state, tuple) and len(call.state) == 5:
        _, shape, kind, is_fortran, raw = call.state
    else:
        return None
    if not isinstance(raw, RawBytes) or not _is_shape(shape):
        return None
    dtype = _parse_dtype(kind)
    if dtype is None or math.prod(shape) * dtype[0].itemsize != raw.nbytes:
        return None
    strides = None
    if is_fortran is True and sum(length > 1 for length in shape) > 1:
        strides = tuple(math.prod(shape[:axis]) for axis in range(len(shape)))
    return FlatArray(raw, dtype[0], shape, strides, dtype[1])


def _parse_dtype(call: Any) -> tuple[np.dtype[Any], bool] | None:
    code = call.arg(0) if isinstance(call, OpaqueCall) and call.path == "numpy.dtype" else None
    if not isinstance(code, str) or code not in CODES:
        return None
    order = call.state[1] if isinstance(call.state, tuple) and len(call.state) > 1 else "<"
    return np.dtype(code), order == ">"


def _is_shape(shape: Any) -> bool:
    return (
        isinstance(shape, tuple) and len(shape) <= MAX_AXES and all(type(n) is int and 0 <= n < 1 << 32 for n in shape)
    )


def _module(call: OpaqueCall) -> str:
    return call.path.partition(".")[0]
