"""The same ONNX model with the zeros of its weights left out, which onnxruntime puts back on loading."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from prunectl.formats import protobuf
from prunectl.formats.base import ModelFile, Tensor
from prunectl.formats.onnx import messages, parts
from prunectl.formats.onnx.proto import Span
from prunectl.formats.onnx.sparse import Sparse, without_zeros
from prunectl.formats.onnx.wire import Reader, place, reading
from prunectl.formats.protobuf import Field
from prunectl.formats.protobuf_write import head

_GRAPH = 7
_INITIALIZER, _INPUT = 5, 11
_FIRST_WITH_SPARSE = 6
"""Version of the format from which a graph may hold sparse tensors."""
_NEVER_SPARSE = {"float8_e8m0fnu", "float4_e2m1fn"}
"""Floats that have no zero, or that lie two to a byte."""
_PIECE_BYTES = 1 << 20

Part = Span | Sparse
"""Bytes to be kept as they are, or a tensor to be written without its zeros."""


def pack(model: ModelFile, target: Path, tick: Callable[[int], None]) -> None:
    """Write an ONNX model again; files beside it stay where they are, and the new one names them as before."""
    with reading(model.path) as reader, model.path.open("rb") as source, target.open("wb") as out:
        for whole, part in _plan(model, reader):
            if isinstance(part, Sparse):
                for piece in part.pieces(model):
                    out.write(piece)
            elif isinstance(part, bytes):
                out.write(part)
            else:
                _copy(source, part, out)
            tick(whole.end - whole.begin)


def _plan(model: ModelFile, reader: Reader) -> Iterator[tuple[Span, Part | bytes]]:
    """Yield runs of the old file, each with what takes its place."""
    has_sparse = messages.model(reader).ir_version >= _FIRST_WITH_SPARSE
    for whole, field in _fields(reader, reader.whole):
        if field.number != _GRAPH or not has_sparse:
            yield whole, whole
            continue
        graph = list(_graph(model, reader, place(field)))
        nbytes = sum(part.nbytes if isinstance(part, Sparse) else part.end - part.begin for _, part in graph)
        if nbytes == field.value:
            yield whole, whole
            continue
        yield Span(whole.begin, field.begin), head(_GRAPH, nbytes)
        yield from graph


def _graph(model: ModelFile, reader: Reader, graph: Span) -> Iterator[tuple[Span, Part]]:
    tensors = {tensor.name: tensor for tensor in model.tensors}
    fields = list(_fields(reader, graph))
    # A caller may replace the initializer of an input, which only a dense one allows.
    inputs = {messages.value(reader, place(field))[0] for _, field in fields if field.number == _INPUT}
    for whole, field in fields:
        part: Part = whole
        if field.number == _INITIALIZER:
            proto = parts.tensor(reader, place(field))
            tensor = tensors.get(proto.name)
            if tensor and proto.external is None and proto.name not in inputs and _may_be_sparse(tensor):
                sparse = without_zeros(model, tensor, reader.data, place(field))
                if sparse.nbytes < whole.end - whole.begin and not sparse.is_too_good:
                    part = sparse
        yield whole, part


def _may_be_sparse(tensor: Tensor) -> bool:
    return tensor.is_float and tensor.dtype.name not in _NEVER_SPARSE and tensor.size > 0


def _fields(reader: Reader, message: Span) -> Iterator[tuple[Span, Field]]:
    """Yield every field of a message, known or not, and where it begins and ends with its tag."""
    begin = message.begin
    for field in protobuf.fields(reader.data, *message):
        yield Span(begin, field.end), field
        begin = field.end


def _copy(source: BinaryIO, run: Span, out: BinaryIO) -> None:
    source.seek(run.begin)
    left = run.end - run.begin
    while left:
        piece = source.read(min(_PIECE_BYTES, left))
        out.write(piece)
        left -= len(piece)
