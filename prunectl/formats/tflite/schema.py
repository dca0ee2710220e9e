"""Parse a .tflite file: its graphs with their tensors and operators, and the location of the constants."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from prunectl.errors import InputError
from prunectl.formats import budgets
from prunectl.formats.budgets import (
    MAX_OPERANDS,
    MAX_OPERATOR_KINDS,
    MAX_TENSORFLOW_AXES,
    MAX_TENSORS,
    MAX_TEXTS_BYTES,
    MAX_TIED,
)
from prunectl.formats.extents import mmap_file

_NAMES = """
ADD AVERAGE_POOL_2D CONCATENATION CONV_2D DEPTHWISE_CONV_2D DEPTH_TO_SPACE DEQUANTIZE EMBEDDING_LOOKUP FLOOR
FULLY_CONNECTED HASHTABLE_LOOKUP L2_NORMALIZATION L2_POOL_2D LOCAL_RESPONSE_NORMALIZATION LOGISTIC LSH_PROJECTION LSTM
MAX_POOL_2D MUL RELU RELU_N1_TO_1 RELU6 RESHAPE RESIZE_BILINEAR RNN SOFTMAX SPACE_TO_DEPTH SVDF TANH CONCAT_EMBEDDINGS
SKIP_GRAM CALL CUSTOM EMBEDDING_LOOKUP_SPARSE PAD UNIDIRECTIONAL_SEQUENCE_RNN GATHER BATCH_TO_SPACE_ND
SPACE_TO_BATCH_ND TRANSPOSE MEAN SUB DIV SQUEEZE UNIDIRECTIONAL_SEQUENCE_LSTM STRIDED_SLICE BIDIRECTIONAL_SEQUENCE_RNN
EXP TOPK_V2 SPLIT LOG_SOFTMAX DELEGATE BIDIRECTIONAL_SEQUENCE_LSTM CAST PRELU MAXIMUM ARG_MAX MINIMUM LESS NEG PADV2
GREATER GREATER_EQUAL LESS_EQUAL SELECT SLICE SIN TRANSPOSE_CONV SPARSE_TO_DENSE TILE EXPAND_DIMS EQUAL NOT_EQUAL LOG
SUM SQRT RSQRT SHAPE POW ARG_MIN FAKE_QUANT REDUCE_PROD REDUCE_MAX PACK LOGICAL_OR ONE_HOT LOGICAL_AND LOGICAL_NOT
UNPACK REDUCE_MIN FLOOR_DIV REDUCE_ANY SQUARE ZEROS_LIKE FILL FLOOR_MOD RANGE RESIZE_NEAREST_NEIGHBOR LEAKY_RELU
SQUARED_DIFFERENCE MIRROR_PAD ABS SPLIT_V UNIQUE CEIL REVERSE_V2 ADD_N GATHER_ND COS WHERE RANK ELU REVERSE_SEQUENCE
MATRIX_DIAG QUANTIZE MATRIX_SET_DIAG ROUND HARD_SWISH IF WHILE NON_MAX_SUPPRESSION_V4 NON_MAX_SUPPRESSION_V5
SCATTER_ND SELECT_V2 DENSIFY SEGMENT_SUM BATCH_MATMUL PLACEHOLDER_FOR_GREATER_OP_CODES CUMSUM CALL_ONCE BROADCAST_TO
RFFT2D CONV_3D IMAG REAL COMPLEX_ABS HASHTABLE HASHTABLE_FIND HASHTABLE_IMPORT HASHTABLE_SIZE REDUCE_ALL
CONV_3D_TRANSPOSE VAR_HANDLE READ_VARIABLE ASSIGN_VARIABLE BROADCAST_ARGS RANDOM_STANDARD_NORMAL BUCKETIZE
RANDOM_UNIFORM MULTINOMIAL GELU DYNAMIC_UPDATE_SLICE RELU_0_TO_1 UNSORTED_SEGMENT_PROD UNSORTED_SEGMENT_MAX
UNSORTED_SEGMENT_SUM ATAN2 UNSORTED_SEGMENT_MIN SIGN BITCAST BITWISE_XOR RIGHT_SHIFT STABLEHLO_LOGISTIC STABLEHLO_ADD
STABLEHLO_DIVIDE STABLEHLO_MULTIPLY STABLEHLO_MAXIMUM STABLEHLO_RESHAPE STABLEHLO_CLAMP STABLEHLO_CONCATENATE
STABLEHLO_BROADCAST_IN_DIM STABLEHLO_CONVOLUTION STABLEHLO_SLICE STABLEHLO_CUSTOM_CALL STABLEHLO_REDUCE STABLEHLO_ABS
STABLEHLO_AND STABLEHLO_COSINE STABLEHLO_EXPONENTIAL STABLEHLO_FLOOR STABLEHLO_LOG STABLEHLO_MINIMUM STABLEHLO_NEGATE
STABLEHLO_OR STABLEHLO_POWER STABLEHLO_REMAINDER STABLEHLO_RSQRT STABLEHLO_SELECT STABLEHLO_SUBTRACT STABLEHLO_TANH
STABLEHLO_SCATTER STABLEHLO_COMPARE STABLEHLO_CONVERT STABLEHLO_DYNAMIC_SLICE STABLEHLO_DYNAMIC_UPDATE_SLICE
STABLEHLO_PAD STABLEHLO_IOTA STABLEHLO_DOT_GENERAL STABLEHLO_REDUCE_WINDOW STABLEHLO_SORT STABLEHLO_WHILE
STABLEHLO_GATHER STABLEHLO_TRANSPOSE DILATE STABLEHLO_RNG_BIT_GENERATOR REDUCE_WINDOW STABLEHLO_COMPOSITE
STABLEHLO_SHIFT_LEFT STABLEHLO_CBRT STABLEHLO_CASE
"""

OPERATORS = tuple(_NAMES.split())
"""Operator names, indexed by their number in `BuiltinOperator`."""

CUSTOM = OPERATORS.index("CUSTOM")


_PART_BYTES, _FEW_PARTS = 24, 1000
"""Minimal bytes of a tensor or operator in a file, and the number of them that is allowed however small the file."""
_PLACEHOLDER_OFFSET = 1
_RUNTIME = "min_runtime_version"


@dataclass(frozen=True, slots=True)
class LiteTensor:
    """The description of a tensor in the file."""

    name: str
    shape: tuple[int, ...]
    code: int
    buffer: int
    is_quantised: bool
    is_external: bool
    sparsity: FlatTable | None


@dataclass(frozen=True, slots=True)
class LiteOperator:
    """One operation, with the indices of its input and output tensors; -1 is an absent one."""

    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: FlatTable | None


@dataclass(frozen=True, slots=True)
class LiteGraph:
    """A subgraph."""

    tensors: tuple[LiteTensor, ...]
    operators: tuple[LiteOperator, ...]


@dataclass(frozen=True, slots=True)
class LiteFile:
    """The content of a file, except for the values of its constants."""

    path: Path
    data: memoryview
    version: int
    description: str
    runtime: str
    buffers: tuple[tuple[int, int], ...]
    """Offset and length of each buffer."""
    graphs: tuple[LiteGraph, ...]


def read_lite(path: Path) -> LiteFile:
    """Parse a file."""
    data = mmap_file(path)
    try:
        return _read(path, data, root(data))
    except FlatBufferError as error:
        raise InputError(f"{path} is truncated or damaged: {error}") from error


def _read(path: Path, data: memoryview, model: FlatTable) -> LiteFile:
    codes = tuple(_operator_name(code) for code in model.children(1, MAX_OPERATOR_KINDS))
    buffers = tuple(_buffer(buffer) for buffer in model.children(4, MAX_TENSORS))
    for number, (offset, nbytes) in enumerate(buffers):
        if offset + nbytes > len(data):
            raise FlatBufferError(f"buffer {number} should end at byte {offset + nbytes}, the file has {len(data)}")
    runs = [run for run in buffers if run[1]]
    if len(runs) - len(set(runs)) > MAX_TIED:
        raise FlatBufferError(f"more than {MAX_TIED} buffers are the same bytes")
    spend = _Budget(len(data)).spend
    graphs = tuple(_graph(graph, codes, spend) for graph in model.children(2, MAX_TENSORS))
    names = {facts.text(0): facts.number(1, 4) for facts in model.children(6, MAX_OPERATOR_KINDS)}
    runtime = ""
    if 0 < names.get(_RUNTIME, 0) < len(buffers):
        offset, nbytes = buffers[names[_RUNTIME]]
        runtime = str(data[offset : offset + min(nbytes, 32)], "ascii", "replace").partition("\0")[0]
    return LiteFile(path, data, model.number(0, 4), model.text(3), runtime, buffers, graphs)


class _Budget:
    """Limits on all graphs together, because several graphs may point to the same long vector."""

    def __init__(self, file_bytes: int) -> None:
        self.parts, self.names_bytes = 0, 0
        self.most = min(MAX_TENSORS, max(file_bytes // _PART_BYTES, _FEW_PARTS))
        self.buffers: Counter[int] = Counter()

    def spend(self, name_bytes: int, buffer: int = 0) -> None:
        """Count one tensor or operator, with the length of its name and, for a tensor, its buffer."""
        self.parts += 1
        self.names_bytes += name_bytes
        self.buffers[buffer] += buffer > 0
        if self.parts > self.most or self.names_bytes > MAX_TEXTS_BYTES:
            raise FlatBufferError(f"it claims more than {self.parts - 1} tensors and operators")
        if self.buffers[buffer] > MAX_TIED:
            raise FlatBufferError(f"more than {MAX_TIED} tensors share buffer {buffer}")


def _operator_name(code: FlatTable) -> str:
    # The first field is limited to 127, which is a placeholder for all later operators.
    number = max(code.number(0, 1, is_signed=True), code.number(3, 4, is_signed=True))
    if number == CUSTOM:
        return code.text(1) or OPERATORS[CUSTOM]
    return OPERATORS[number] if 0 <= number < len(OPERATORS) else f"operator {number}"


def _buffer(buffer: FlatTable) -> tuple[int, int]:
    offset = buffer.number(1, 8)
    # Models of more than 2 GB store their data behind the FlatBuffer.
    if offset > _PLACEHOLDER_OFFSET:
        return offset, buffer.number(2, 8)
    run = buffer.run(0, 1)
    return run.begin, run.count


def _graph(graph: FlatTable, codes: tuple[str, ...], spend: Callable[..., None]) -> LiteGraph:
    tensors = []
    for table in graph.children(0, MAX_TENSORS):
        tensor = _tensor(table)
        spend(len(tensor.name), tensor.buffer)
        tensors.append(tensor)
    operators = []
    for table in graph.children(3, MAX_TENSORS):
        spend(0)
        operators.append(_operator(table, codes, len(tensors)))
    return LiteGraph(tuple(tensors), tuple(operators))


def _tensor(tensor: FlatTable) -> LiteTensor:
    sizes = tensor.numbers(0, np.int32, MAX_TENSORFLOW_AXES + 1)
    if len(sizes) > MAX_TENSORFLOW_AXES:
        raise FlatBufferError(f"a tensor of more than {MAX_TENSORFLOW_AXES} dimensions")
    shape = tuple(int(size) for size in sizes)
    if math.prod(max(size, 1) for size in shape) > 1 << 58:
        raise FlatBufferError("a shape too large for any memory")
    quantisation = tensor.child(4)
    return LiteTensor(
        name=tensor.text(3),
        shape=shape,
        code=tensor.number(1, 1, is_signed=True),
        buffer=tensor.number(2, 4),
        is_quantised=quantisation is not None and quantisation.run(2, 4).count > 0,
        is_external=tensor.number(10, 4) > 0,
        sparsity=tensor.child(6),
    )


def _operator(operator: FlatTable, codes: tuple[str, ...], tensors: int) -> LiteOperator:
    code = operator.number(0, 4)
    inputs, outputs = (tuple(map(int, operator.numbers(field, np.int32, MAX_OPERANDS))) for field in (1, 2))
    if code >= len(codes) or any(not -1 <= index < tensors for index in inputs + outputs):
        raise FlatBufferError("an operator refers to a code or a tensor that does not exist")
    return LiteOperator(codes[code], inputs, outputs, operator.child(4))


STRING, RESOURCE, VARIANT = 5, 13, 14
NOT_NUMBERS = frozenset({STRING, RESOURCE, VARIANT})

DTYPES: dict[int, np.dtype[Any]] = {
    0: np.dtype(np.float32),
    1: np.dtype(np.float16),
    2: np.dtype(np.int32),
    3: np.dtype(np.uint8),
    4: np.dtype(np.int64),
    6: np.dtype(np.bool_),
    7: np.dtype(np.int16),
    8: np.dtype(np.complex64),
    9: np.dtype(np.int8),
    10: np.dtype(np.float64),
    11: np.dtype(np.complex128),
    12: np.dtype(np.uint64),
    15: np.dtype(np.uint32),
    16: np.dtype(np.uint16),
    17: np.dtype(ml_dtypes.int4),
    18: np.dtype(ml_dtypes.bfloat16),
    19: np.dtype(ml_dtypes.int2),
    20: np.dtype(ml_dtypes.uint4),
}
"""Dtypes by their number in `TensorType`."""

BITS = {17: 4, 19: 2, 20: 4}
"""Bits of an element, for the types with several elements in a byte."""


def stored_bytes(code: int, size: int) -> int:
    """The bytes that a number of elements take in the file."""
    return (size * BITS[code] + 7) // 8 if code in BITS else size * DTYPES[code].itemsize


OFFSET_BYTES = 4


class FlatBufferError(ValueError):
    """The bytes are not a FlatBuffer."""


@dataclass(frozen=True, slots=True)
class Vector:
    """The location of a vector's elements."""

    begin: int
    count: int


@dataclass(frozen=True, slots=True)
class FlatTable:
    """A FlatBuffer table, whose vtable has the offset of each field by its number."""

    data: memoryview
    begin: int
    vtable: int
    vtable_bytes: int
    table_bytes: int

    def number(self, field: int, nbytes: int, *, is_signed: bool = False) -> int:
        """An integer field; 0 if it is absent."""
        offset = self._find(field, nbytes)
        return 0 if offset == 0 else int.from_bytes(self.data[offset : offset + nbytes], "little", signed=is_signed)

    def child(self, field: int) -> FlatTable | None:
        """The table that a field points to."""
        offset = self._find(field, OFFSET_BYTES)
        return None if offset == 0 else table_at(self.data, _follow(self.data, offset))

    def run(self, field: int, item_bytes: int) -> Vector:
        """The location of a vector's elements; an absent vector is empty."""
        offset = self._find(field, OFFSET_BYTES)
        if offset == 0:
            return Vector(0, 0)
        begin = _follow(self.data, offset)
        count = _number_at(self.data, begin, 4)
        if begin + 4 + count * item_bytes > len(self.data):
            raise FlatBufferError(f"a vector of {count} elements reaches past its end")
        return Vector(begin + 4, count)

    def children(self, field: int, limit: int) -> tuple[FlatTable, ...]:
        """The tables in a vector; FlatBufferError if there are more than ``limit``."""
        run = self.run(field, OFFSET_BYTES)
        if run.count > limit:
            raise FlatBufferError(f"a vector of {run.count} tables, more than prunectl allows")
        offsets = range(run.begin, run.begin + OFFSET_BYTES * run.count, OFFSET_BYTES)
        return tuple(table_at(self.data, _follow(self.data, offset)) for offset in offsets)

    def numbers(self, field: int, dtype: type[np.generic], limit: int | None = None) -> NDArray[np.int64]:
        """The numbers in a vector; at most the first ``limit`` of them."""
        kind = np.dtype(dtype).newbyteorder("<")
        run = self.run(field, kind.itemsize)
        count = run.count if limit is None else min(limit, run.count)
        return np.frombuffer(self.data, kind, count, run.begin).astype(np.int64) if count else np.zeros(0, np.int64)

    def text(self, field: int) -> str:
        """A string."""
        run = self.run(field, 1)
        if run.count > budgets.MAX_NAME_BYTES:
            raise FlatBufferError(f"a name of {run.count} bytes")
        return str(self.data[run.begin : run.begin + run.count], "utf-8", "backslashreplace")

    def _find(self, field: int, nbytes: int) -> int:
        """The offset of a field in the file; 0 if it is absent."""
        slot = 4 + 2 * field
        if slot + 2 > self.vtable_bytes:
            return 0
        offset = _number_at(self.data, self.vtable + slot, 2)
        if offset and offset + nbytes > self.table_bytes:
            raise FlatBufferError("a field lies outside of its table")
        return self.begin + offset if offset else 0


def root(data: memoryview) -> FlatTable:
    """The root table of a FlatBuffer."""
    return table_at(data, _follow(data, 0))


def table_at(data: memoryview, offset: int) -> FlatTable:
    """The table at an offset; FlatBufferError if it reaches past the end of the file."""
    vtable = offset - _number_at(data, offset, 4, is_signed=True)
    vtable_bytes, table_bytes = _number_at(data, vtable, 2), _number_at(data, vtable + 2, 2)
    if vtable + vtable_bytes > len(data) or offset + table_bytes > len(data):
        raise FlatBufferError("a table reaches past its end")
    return FlatTable(data, offset, vtable, vtable_bytes, table_bytes)


def _follow(data: memoryview, offset: int) -> int:
    return offset + _number_at(data, offset, OFFSET_BYTES)


def _number_at(data: memoryview, offset: int, nbytes: int, *, is_signed: bool = False) -> int:
    if offset < 0 or offset + nbytes > len(data):
        raise FlatBufferError("an offset points past its end")
    return int.from_bytes(data[offset : offset + nbytes], "little", signed=is_signed)
