"""An ONNX file written again with some fields in another form, all others byte for byte."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from prunectl import errors
from prunectl.errors import InputError
from prunectl.formats import budgets, extents, protobuf
from prunectl.formats.base import ModelFile, Tensor
from prunectl.formats.onnx import messages
from prunectl.formats.onnx.messages import (
    DOUBLES,
    FLOATS,
    INT32S,
    INT64S,
    RAW,
    UINT64S,
    ProtoReader,
    Span,
    location,
    parsing,
)
from prunectl.formats.onnx.model import open_model
from prunectl.formats.patch import TensorUpdate, patch_files
from prunectl.formats.protobuf import BYTES, Field, length_prefix, number

GRAPH = 7
_PIECE_BYTES = 1 << 20
_ENTRY, _KEY, _VALUE, _LOCATION = "entry", 1, 2, "location"
_INNER: Mapping[str, Mapping[int, str]] = {
    "model": {GRAPH: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: _ENTRY},
}
"""Messages in which a tensor may lie, by the number of their field."""
_MAX_MESSAGES = 3 * budgets.MAX_ONNX_DEPTH + 8
"""Messages inside messages, as far as their tensors are read."""


class FieldReplacement(Protocol):
    """A field that takes the place of another."""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole field."""

    def pieces(self) -> Iterator[bytes]:
        """Yield the field piece by piece."""


Change = Callable[[ProtoReader, Span, Field], FieldReplacement | None]
"""What takes the place of a field of the graph, given with where it lies; None if it stays."""
Location = Callable[[str], str | None]
"""What a file of external data is called from now on, given what it was called; None if it stays."""
Runs = list[tuple[Span, bytes | None]]
"""A message as runs of the old file, each with what takes its place; None if it stays."""


def replace_fields(path: Path, target: Path, change: Change, tick: Callable[[int], None]) -> None:
    """Write the file again; those beside it stay where they are, and the new one names them as before."""
    with parsing(path) as reader, path.open("rb") as source, target.open("wb") as out:
        for whole, part in _plan(reader, change):
            if isinstance(part, bytes):
                out.write(part)
            elif part is None:
                _copy(source, whole, out)
            else:
                out.writelines(part.pieces())
            tick(whole.end - whole.begin)


def relocate(path: Path, target_of: Location) -> None:
    """Name the files of external data otherwise, in every tensor of a written model."""
    target = path.with_name(f"{path.name}.relocated")
    with parsing(path) as reader, path.open("rb") as source, target.open("wb") as out:
        for run, part in _relocated(reader, reader.whole, "model", target_of, _MAX_MESSAGES) or [(reader.whole, None)]:
            if part is None:
                _copy(source, run, out)
            else:
                out.write(part)
    os.replace(target, path)


def _relocated(reader: ProtoReader, span: Span, kind: str, target_of: Location, depth: int) -> Runs | None:
    """A message in which external data has other names; None if it stays as it is."""
    if kind == _ENTRY:
        return _entry(reader, span, target_of)
    runs: Runs = []
    for whole, field in fields(reader, span):
        inner = _INNER[kind].get(field.number) if field.wire == BYTES and depth else None
        replaced = _relocated(reader, location(field), inner, target_of, depth - 1) if inner else None
        if replaced is not None:
            nbytes = sum(run.end - run.begin if part is None else len(part) for run, part in replaced)
            runs += [(Span(whole.begin, field.begin), length_prefix(field.number, nbytes)), *replaced]
        elif runs and runs[-1][1] is None:
            runs[-1] = Span(runs[-1][0].begin, whole.end), None
        else:
            runs.append((whole, None))
    return runs if any(part is not None for _, part in runs) else None


def _entry(reader: ProtoReader, span: Span, target_of: Location) -> Runs | None:
    texts = {field.number: protobuf.text(reader.data, field) for _, field in fields(reader, span)}
    moved = target_of(texts.get(_VALUE, "")) if texts.get(_KEY) == _LOCATION else None
    if moved is None:
        return None
    key, value = _LOCATION.encode(), moved.encode()
    return [(span, length_prefix(_KEY, len(key)) + key + length_prefix(_VALUE, len(value)) + value)]


def fields(reader: ProtoReader, message: Span) -> Iterator[tuple[Span, Field]]:
    """Yield every field of a message, known or not, and where it begins and ends with its tag."""
    begin = message.begin
    for field in protobuf.fields(reader.data, *message):
        yield Span(begin, field.end), field
        begin = field.end


def _plan(reader: ProtoReader, change: Change) -> Iterator[tuple[Span, FieldReplacement | bytes | None]]:
    """Yield runs of the old file, each with what takes its place."""
    for whole, field in fields(reader, reader.whole):
        if field.number != GRAPH:
            yield whole, None
            continue
        graph = [(inner, change(reader, inner, item)) for inner, item in fields(reader, location(field))]
        if all(part is None for _, part in graph):
            yield whole, None
            continue
        nbytes = sum(part.nbytes if part is not None else inner.end - inner.begin for inner, part in graph)
        yield Span(whole.begin, field.begin), length_prefix(GRAPH, nbytes)
        yield from graph


def _copy(source: BinaryIO, run: Span, out: BinaryIO) -> None:
    source.seek(run.begin)
    left = run.end - run.begin
    while left:
        with errors.reading(Path(source.name)):
            piece = source.read(min(_PIECE_BYTES, left))
        if not piece:
            raise InputError(f"{source.name} was truncated while prunectl was copying it")
        out.write(piece)
        left -= len(piece)


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
        return self.tensor.nbytes > max(budgets.MAX_UNFOLDED_TENSOR_BYTES, budgets.BOMB_RATIO * self._data_bytes)

    @property
    def _data_bytes(self) -> int:
        return self.kept * (self.tensor.dtype.itemsize + _INDEX.itemsize)

    def _heads(self) -> tuple[bytes, bytes, bytes]:
        """What stands before the values, before the indices, and behind them."""
        length = number(DIMS, self.kept)
        # One index for each value, counted over the flattened tensor: the shortest of the two forms that ONNX knows.
        values = self.facts + length + length_prefix(RAW, self.kept * self.tensor.dtype.itemsize)
        indices = length + number(_TENSOR_TYPE, _INT64) + length_prefix(RAW, self.kept * _INDEX.itemsize)
        before = length_prefix(VALUES, len(values) + self.kept * self.tensor.dtype.itemsize) + values
        between = length_prefix(_INDICES, len(indices) + self.kept * _INDEX.itemsize) + indices
        shape = b"".join(number(_DIMS, length) for length in self.tensor.shape)
        return length_prefix(FIELD, len(before) + len(between) + len(shape) + self._data_bytes) + before, between, shape

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


def _kept_fields(reader: ProtoReader, dense: Span) -> bytes:
    """What a dense tensor says of itself beside its shape and its numbers."""
    return b"".join(
        reader.data[slice(*whole)] for whole, field in fields(reader, dense) if field.number not in _REPLACED
    )


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


INITIALIZER, INPUT = 5, 11
_FIRST_WITH_SPARSE = 6
"""Version of the format from which a graph may hold sparse tensors."""
_NEVER_SPARSE = {"float8_e8m0fnu", "float4_e2m1fn"}
"""Floats that have no zero, or that lie two to a byte."""


def pack(model: ModelFile, target: Path, tick: Callable[[int], None]) -> None:
    """Write an ONNX model again, its initializers sparse where that is smaller."""
    tensors = {tensor.name: tensor for tensor in model.tensors}
    with parsing(model.path) as reader:
        has_sparse = messages.model(reader).ir_version >= _FIRST_WITH_SPARSE
        inputs = _inputs(reader)

    spent = [0, 0]

    def sparse(reader: ProtoReader, whole: Span, field: Field) -> FieldReplacement | None:
        if field.number != INITIALIZER or not has_sparse:
            return None
        proto = messages.tensor(reader, location(field))
        tensor = tensors.get(proto.name)
        if tensor is None or proto.external is not None or proto.name in inputs or not _may_be_sparse(tensor):
            return None
        # Minus zero is kept, as it has bits.
        kept = sum(int(np.count_nonzero(bits)) for _, bits in _pieces(model, tensor))
        sparse = Sparse(model, tensor, kept, _kept_fields(reader, location(field)))
        unfolded, stored = spent[0] + tensor.nbytes, spent[1] + sparse.nbytes
        # What would be refused when it is opened again stays dense.
        is_bomb = sparse.is_too_good or unfolded > max(budgets.MAX_UNFOLDED_BYTES, budgets.MAX_UNFOLDING * stored)
        if is_bomb or sparse.nbytes >= whole.end - whole.begin:
            return None
        spent[:] = unfolded, stored
        return sparse

    replace_fields(model.path, target, sparse, tick)


def _inputs(reader: ProtoReader) -> set[str]:
    """The names of the graph's inputs: a caller may replace their initializers, if these are dense."""
    graphs = [location(field) for _, field in fields(reader, reader.whole) if field.number == GRAPH]
    inputs = (field for graph in graphs for _, field in fields(reader, graph) if field.number == INPUT)
    return {messages.value(reader, location(field))[0] for field in inputs}


def _may_be_sparse(tensor: Tensor) -> bool:
    return tensor.is_float and tensor.dtype.name not in _NEVER_SPARSE and tensor.size > 0


@dataclass(frozen=True, slots=True)
class Dense:
    """An initializer with new numbers, as raw bytes."""

    rewrite: TensorUpdate
    facts: bytes
    """Its name, its type, and what nobody knows."""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole field."""
        return len(self._head()) + self.rewrite.tensor.nbytes

    def _head(self) -> bytes:
        tensor = self.rewrite.tensor
        shape = b"".join(number(DIMS, length) for length in tensor.shape)
        before = self.facts + shape + length_prefix(RAW, tensor.nbytes)
        return length_prefix(INITIALIZER, len(before) + tensor.nbytes) + before

    def pieces(self) -> Iterator[bytes]:
        """Yield the field piece by piece."""
        yield self._head()
        for piece in self.rewrite.raw():
            yield bytes(piece)


def write(model: ModelFile, targets: dict[Path, Path], rewrites: Sequence[TensorUpdate]) -> None:
    """Write the model with new numbers in it, its data under their new names; one that was packed comes out packed."""
    if all(rewrite.tensor.storage.extent is not None for rewrite in rewrites):
        patch_files(model, targets, rewrites)
        _relocate(model, targets)
        return
    beside = {source: target for source, target in targets.items() if source != model.path}
    outside = [rewrite for rewrite in rewrites if _path(rewrite) in beside]
    patch_files(model, beside, outside)
    changed = {rewrite.tensor.name: rewrite for rewrite in rewrites if rewrite not in outside}
    target = targets[model.path]
    done: set[str] = set()

    def dense(reader: ProtoReader, _: Span, field: Field) -> FieldReplacement | None:
        if field.number == INITIALIZER:
            span = location(field)
        elif field.number == FIELD:
            span = next(location(inner) for _, inner in fields(reader, location(field)) if inner.number == VALUES)
        else:
            return None
        name = messages.tensor(reader, span).name
        if name not in changed:
            return None
        done.add(name)
        return Dense(changed[name], _kept_fields(reader, span))

    replace_fields(model.path, target, dense, lambda _: None)
    _relocate(model, targets)
    if left := [name for name in changed if name not in done]:
        raise InputError(f"{model.path} stores {left[0]} in a form that cannot be changed: skip it with --exclude")
    if model.about.is_compressed:
        packed = target.with_name(f"{target.name}.packed")
        pack(open_model(target), packed, lambda _: None)
        os.replace(packed, target)


def _relocate(model: ModelFile, targets: Mapping[Path, Path]) -> None:
    names = [file.relative_to(model.path.parent).as_posix() for file in model.files]
    if any(relocated(model, targets, name) for name in names if name != model.path.name):
        relocate(targets[model.path], partial(relocated, model, targets))


def relocated(model: ModelFile, targets: Mapping[Path, Path], location: str) -> str | None:
    """What a file of external data is called from now on, as the graph names it; None if it keeps its name."""
    source, folder = model.path.parent / location, targets[model.path].parent
    target = targets.get(source)
    if target is None or target.relative_to(folder) == source.relative_to(model.path.parent):
        return None
    return target.relative_to(folder).as_posix()


def _path(rewrite: TensorUpdate) -> Path | None:
    extent = rewrite.tensor.storage.extent
    return extent.path if extent is not None else None
