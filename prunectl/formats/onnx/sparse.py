"""A tensor of an ONNX graph written without its zeros: the values that are left, and their places."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prunectl.formats import extents, protobuf
from prunectl.formats.base import ModelFile, Tensor
from prunectl.formats.onnx.proto import DOUBLES, FLOATS, INT32S, INT64S, RAW, UINT64S, Span
from prunectl.formats.onnx.tensors import BOMB_RATIO, MAX_BLOWN_UP_BYTES
from prunectl.formats.protobuf_write import head, number

FIELD = 15
"""Where a graph keeps such tensors."""
VALUES, _INDICES, _DIMS = 1, 2, 3
_INT64 = 7
_INDEX = np.dtype("<i8")
DIMS, _TENSOR_TYPE = 1, 2
_REPLACED = {DIMS, FLOATS, INT32S, INT64S, RAW, DOUBLES, UINT64S}
"""Fields of the dense tensor that take another form; the others are kept, those that nobody knows included."""


@dataclass(frozen=True, slots=True)
class Sparse:
    """A tensor that is to be written without its zeros."""

    model: ModelFile
    tensor: Tensor
    kept: int
    """How many values are not zero."""
    facts: bytes
    """What the dense tensor says of itself beside its shape and its numbers: its name, its type."""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole field."""
        return len(b"".join(self._heads())) + self._data_bytes

    @property
    def is_too_good(self) -> bool:
        """Whether a reader would take it for a bomb."""
        return self.tensor.nbytes > max(MAX_BLOWN_UP_BYTES, BOMB_RATIO * self._data_bytes)

    @property
    def _data_bytes(self) -> int:
        return self.kept * (self.tensor.dtype.itemsize + _INDEX.itemsize)

    def _heads(self) -> tuple[bytes, bytes, bytes]:
        """Return what stands before the values, before the indices, and behind them."""
        length = number(DIMS, self.kept)
        # One index for each value, counted over the flattened tensor: the shortest of the two forms that ONNX knows.
        values = self.facts + length + head(RAW, self.kept * self.tensor.dtype.itemsize)
        indices = length + number(_TENSOR_TYPE, _INT64) + head(RAW, self.kept * _INDEX.itemsize)
        before = head(VALUES, len(values) + self.kept * self.tensor.dtype.itemsize) + values
        between = head(_INDICES, len(indices) + self.kept * _INDEX.itemsize) + indices
        shape = b"".join(number(_DIMS, length) for length in self.tensor.shape)
        return head(FIELD, len(before) + len(between) + len(shape) + self._data_bytes) + before, between, shape

    def pieces(self) -> Iterator[bytes]:
        """Yield the field piece by piece."""
        before, between, behind = self._heads()
        yield before
        for _, bits in _pieces(self.model, self.tensor):
            yield bits[bits != 0].tobytes()
        yield between
        for begin, bits in _pieces(self.model, self.tensor):
            yield (np.flatnonzero(bits) + begin).astype(_INDEX).tobytes()
        yield behind


def without_zeros(model: ModelFile, tensor: Tensor, data: memoryview, dense: Span) -> Sparse:
    """Return the sparse form of a dense tensor that lies in ``data``; minus zero is kept, as it has bits."""
    kept = sum(int(np.count_nonzero(bits)) for _, bits in _pieces(model, tensor))
    return Sparse(model, tensor, kept, facts_of(data, dense))


def facts_of(data: memoryview, dense: Span) -> bytes:
    """Return what a dense tensor says of itself beside its shape and its numbers."""
    facts, begin = bytearray(), dense.begin
    for field in protobuf.fields(data, *dense):
        if field.number not in _REPLACED:
            facts += data[begin : field.end]
        begin = field.end
    return bytes(facts)


def _pieces(model: ModelFile, tensor: Tensor) -> Iterator[tuple[int, NDArray[np.unsignedinteger]]]:
    """Yield the bits of a tensor, and which element each piece begins with; it is valid until the next."""
    unsigned = np.dtype(f"u{tensor.dtype.itemsize}")
    if tensor.storage.extent is None:
        yield 0, model.read(tensor).reshape(-1).view(unsigned)
        return
    begin = 0
    for bits in extents.blocks(tensor.storage.extent, unsigned):
        yield begin, bits
        begin += bits.size
