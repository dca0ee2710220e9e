"""The same ONNX model with the zeros of its weights left out, which onnxruntime puts back on loading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from prunectl.formats import budgets
from prunectl.formats.base import ModelFile, Tensor
from prunectl.formats.onnx import messages, parts
from prunectl.formats.onnx.proto import Span
from prunectl.formats.onnx.rebuild import GRAPH, Part, fields, rebuild
from prunectl.formats.onnx.sparse import without_zeros
from prunectl.formats.onnx.wire import Reader, place, reading
from prunectl.formats.protobuf import Field

INITIALIZER, INPUT = 5, 11
_FIRST_WITH_SPARSE = 6
"""Version of the format from which a graph may hold sparse tensors."""
_NEVER_SPARSE = {"float8_e8m0fnu", "float4_e2m1fn"}
"""Floats that have no zero, or that lie two to a byte."""


def pack(model: ModelFile, target: Path, tick: Callable[[int], None]) -> None:
    """Write an ONNX model again, its initializers sparse where that is smaller."""
    tensors = {tensor.name: tensor for tensor in model.tensors}
    with reading(model.path) as reader:
        has_sparse = messages.model(reader).ir_version >= _FIRST_WITH_SPARSE
        inputs = _inputs(reader)

    spent = [0, 0]

    def sparse(reader: Reader, whole: Span, field: Field) -> Part | None:
        if field.number != INITIALIZER or not has_sparse:
            return None
        proto = parts.tensor(reader, place(field))
        tensor = tensors.get(proto.name)
        if tensor is None or proto.external is not None or proto.name in inputs or not _may_be_sparse(tensor):
            return None
        found = without_zeros(model, tensor, reader.data, place(field))
        unfolded, stored = spent[0] + tensor.nbytes, spent[1] + found.nbytes
        # What would be refused when it is opened again stays dense.
        is_bomb = found.is_too_good or unfolded > max(budgets.MAX_UNFOLDED_BYTES, budgets.MAX_UNFOLDING * stored)
        if is_bomb or found.nbytes >= whole.end - whole.begin:
            return None
        spent[:] = unfolded, stored
        return found

    rebuild(model.path, target, sparse, tick)


def _inputs(reader: Reader) -> set[str]:
    """Return the names of the graph's inputs: a caller may replace their initializers, if these are dense."""
    graphs = [place(field) for _, field in fields(reader, reader.whole) if field.number == GRAPH]
    found = (field for graph in graphs for _, field in fields(reader, graph) if field.number == INPUT)
    return {messages.value(reader, place(field))[0] for field in found}


def _may_be_sparse(tensor: Tensor) -> bool:
    return tensor.is_float and tensor.dtype.name not in _NEVER_SPARSE and tensor.size > 0
