"""Rewrite an ONNX file with some fields replaced, and all others byte for byte as they were."""

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
from prunectl.formats.scratch import check_is_text

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
"""For each message type, the fields through which a tensor may be reached, and their message types."""
_MAX_MESSAGES = 3 * budgets.MAX_ONNX_DEPTH + 8
"""Nesting of messages in which tensors are found."""


class FieldReplacement(Protocol):
    """A field that replaces another."""

    @property
    def nbytes(self) -> int:
        """Size of the whole field, with its tag and length."""

    def pieces(self) -> Iterator[bytes]:
        """Yield the bytes of the whole field in pieces."""


Change = Callable[[ProtoReader, Span, Field], FieldReplacement | None]
"""Returns the replacement for a field of the graph, given with its byte range; None to keep it."""
Location = Callable[[str], str | None]
"""Returns the new path of an external data file, given the old one; None to keep it."""
Runs = list[tuple[Span, bytes | None]]
"""A message as byte ranges of the old file, each with its replacement; None to keep it."""


def replace_fields(path: Path, target: Path, change: Change, tick: Callable[[int], None]) -> None:
    """Write a copy of the file with changed fields of its graph; it refers to the same external data files."""
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
    """Change the paths of external data files in every tensor of a written model."""
    target = path.with_name(f"{path.name}.relocated")
    with parsing(path) as reader, path.open("rb") as source, target.open("wb") as out:
        for run, part in _relocated(reader, reader.whole, "model", target_of, _MAX_MESSAGES) or [(reader.whole, None)]:
            if part is None:
                _copy(source, run, out)
            else:
                out.write(part)
    os.replace(target, path)


def _relocated(reader: ProtoReader, span: Span, kind: str, target_of: Location, depth: int) -> Runs | None:
    """A message with new paths of external data files; None if nothing changes in it."""
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
    check_is_text(moved)
    key, value = _LOCATION.encode(), moved.encode()
    return [(span, length_prefix(_KEY, len(key)) + key + length_prefix(_VALUE, len(value)) + value)]


def fields(reader: ProtoReader, message: Span) -> Iterator[tuple[Span, Field]]:
    """Yield every field of a message, known or not, with the byte range of the field including its tag."""
    begin = message.begin
    for field in protobuf.fields(reader.data, *message):
        yield Span(begin, field.end), field
        begin = field.end


def _plan(reader: ProtoReader, change: Change) -> Iterator[tuple[Span, FieldReplacement | bytes | None]]:
    """Yield byte ranges of the old file, each with its replacement; None to copy it."""
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
"""The field of a graph with its sparse initializers."""
VALUES, _INDICES, _DIMS = 1, 2, 3
_INT64 = 7
_INDEX = np.dtype("<i8")
DIMS, _TENSOR_TYPE = 1, 2
_REPLACED = {DIMS, FLOATS, INT32S, INT64S, RAW, DOUBLES, UINT64S}
"""Fields of a dense tensor that are replaced; all others are kept, including unknown ones."""


@dataclass(frozen=True, slots=True)
class Sparse:
    """A tensor to be written as a sparse one."""

    model: ModelFile
    tensor: Tensor
    kept: int
    """Number of nonzero values."""
    facts: bytes
    """The other fields of the dense tensor, besides its shape and its elements, such as its name and type."""

    @property
    def nbytes(self) -> int:
        """Size of the whole field."""
        return len(b"".join(self._heads())) + self._data_bytes

    @property
    def looks_like_bomb(self) -> bool:
        """Whether prunectl would refuse the output as a decompression bomb."""
        return self.tensor.nbytes > max(budgets.MAX_UNFOLDED_TENSOR_BYTES, budgets.BOMB_RATIO * self._data_bytes)

    @property
    def _data_bytes(self) -> int:
        return self.kept * (self.tensor.dtype.itemsize + _INDEX.itemsize)

    def _heads(self) -> tuple[bytes, bytes, bytes]:
        """The bytes before the values, before the indices, and behind the indices."""
        length = number(DIMS, self.kept)
        # One linear index for each value, which is the shorter of the two forms of indices in ONNX.
        values = self.facts + length + length_prefix(RAW, self.kept * self.tensor.dtype.itemsize)
        indices = length + number(_TENSOR_TYPE, _INT64) + length_prefix(RAW, self.kept * _INDEX.itemsize)
        before = length_prefix(VALUES, len(values) + self.kept * self.tensor.dtype.itemsize) + values
        between = length_prefix(_INDICES, len(indices) + self.kept * _INDEX.itemsize) + indices
        shape = b"".join(number(_DIMS, length) for length in self.tensor.shape)
        return length_prefix(FIELD, len(before) + len(between) + len(shape) + self._data_bytes) + before, between, shape

    def pieces(self) -> Iterator[bytes]:
        """Yield the whole field in pieces."""
        before, between, behind = self._heads()
        yield before
        for _, bits in _pieces(self.model, self.tensor):
            yield bits[bits != 0].tobytes()
        yield between
        for begin, bits in _pieces(self.model, self.tensor):
            yield (np.flatnonzero(bits) + begin).astype(_INDEX).tobytes()
        yield behind


def _kept_fields(reader: ProtoReader, dense: Span) -> bytes:
    """The fields of a dense tensor other than its shape and its elements."""
    return b"".join(
        reader.data[slice(*whole)] for whole, field in fields(reader, dense) if field.number not in _REPLACED
    )


def _pieces(model: ModelFile, tensor: Tensor) -> Iterator[tuple[int, NDArray[np.unsignedinteger]]]:
    """Yield the bits of a tensor in pieces, each with the index of its first element, and valid until the next."""
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
"""The first IR version in which a graph may have sparse initializers."""
_NEVER_SPARSE = {"float8_e8m0fnu", "float4_e2m1fn"}
"""Float dtypes that have no zero, or two elements in a byte."""


def pack(model: ModelFile, target: Path, tick: Callable[[int], None]) -> None:
    """Rewrite an ONNX model with sparse initializers where these are smaller."""
    tensors = {tensor.name: tensor for tensor in model.tensors}
    with parsing(model.path) as reader:
        has_sparse = messages.model(reader).ir_version >= _FIRST_WITH_SPARSE
        inputs = _inputs(reader)

    total_expanded = total_stored = 0

    def sparse(reader: ProtoReader, whole: Span, field: Field) -> FieldReplacement | None:
        nonlocal total_expanded, total_stored
        if field.number != INITIALIZER or not has_sparse:
            return None
        proto = messages.tensor(reader, location(field))
        tensor = tensors.get(proto.name)
        if tensor is None or proto.external is not None or proto.name in inputs or not _may_be_sparse(tensor):
            return None
        # A minus zero counts as nonzero, because its bits are not all zero.
        kept = sum(int(np.count_nonzero(bits)) for _, bits in _pieces(model, tensor))
        sparse = Sparse(model, tensor, kept, _kept_fields(reader, location(field)))
        expanded, stored = total_expanded + tensor.nbytes, total_stored + sparse.nbytes
        # A tensor stays dense if prunectl would refuse to open the output.
        is_bomb = sparse.looks_like_bomb or expanded > max(budgets.MAX_UNFOLDED_BYTES, budgets.MAX_UNFOLDING * stored)
        if is_bomb or sparse.nbytes >= whole.end - whole.begin:
            return None
        total_expanded, total_stored = expanded, stored
        return sparse

    replace_fields(model.path, target, sparse, tick)


def _inputs(reader: ProtoReader) -> set[str]:
    """The names of the graph's inputs; their initializers are defaults, which a caller can override only if dense."""
    graphs = [location(field) for _, field in fields(reader, reader.whole) if field.number == GRAPH]
    inputs = (field for graph in graphs for _, field in fields(reader, graph) if field.number == INPUT)
    return {messages.value(reader, location(field))[0] for field in inputs}


def _may_be_sparse(tensor: Tensor) -> bool:
    return tensor.is_float and tensor.dtype.name not in _NEVER_SPARSE and tensor.size > 0


@dataclass(frozen=True, slots=True)
class Dense:
    """A dense initializer with updated values, stored as raw bytes."""

    rewrite: TensorUpdate
    facts: bytes
    """Its other fields: its name, its type, and unknown ones."""

    @property
    def nbytes(self) -> int:
        """Size of the whole field."""
        return len(self._head()) + self.rewrite.tensor.nbytes

    def _head(self) -> bytes:
        tensor = self.rewrite.tensor
        shape = b"".join(number(DIMS, length) for length in tensor.shape)
        before = self.facts + shape + length_prefix(RAW, tensor.nbytes)
        return length_prefix(INITIALIZER, len(before) + tensor.nbytes) + before

    def pieces(self) -> Iterator[bytes]:
        """Yield the whole field in pieces."""
        yield self._head()
        for piece in self.rewrite.raw():
            yield bytes(piece)


def write(model: ModelFile, targets: dict[Path, Path], rewrites: Sequence[TensorUpdate]) -> None:
    """Write the model with updated tensors, and its external data files; a packed model is packed again."""
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
    if failed := [name for name in changed if name not in done]:
        raise InputError(f"{model.path} stores {failed[0]} in a form that cannot be changed: skip it with --exclude")
    if model.about.is_compressed:
        packed = target.with_name(f"{target.name}.packed")
        pack(open_model(target), packed, lambda _: None)
        os.replace(packed, target)


def _relocate(model: ModelFile, targets: Mapping[Path, Path]) -> None:
    names = [file.relative_to(model.path.parent).as_posix() for file in model.files]
    if any(relocated(model, targets, name) for name in names if name != model.path.name):
        relocate(targets[model.path], partial(relocated, model, targets))


def relocated(model: ModelFile, targets: Mapping[Path, Path], location: str) -> str | None:
    """The new path of an external data file, relative to the model; None if it does not change."""
    source, folder = model.path.parent / location, targets[model.path].parent
    target = targets.get(source)
    if target is None or target.relative_to(folder) == source.relative_to(model.path.parent):
        return None
    return target.relative_to(folder).as_posix()


def _path(rewrite: TensorUpdate) -> Path | None:
    extent = rewrite.tensor.storage.extent
    return extent.path if extent is not None else None
