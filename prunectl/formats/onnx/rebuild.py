"""An ONNX file written again with some fields in another form, all others byte for byte."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Protocol

from prunectl import errors
from prunectl.errors import InputError
from prunectl.formats import protobuf
from prunectl.formats.onnx.proto import Span
from prunectl.formats.onnx.scopes import MAX_DEPTH
from prunectl.formats.onnx.wire import Reader, place, reading
from prunectl.formats.protobuf import BYTES, Field
from prunectl.formats.protobuf_write import head

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
_MAX_MESSAGES = 3 * MAX_DEPTH + 8
"""Messages inside messages, as far as their tensors are read."""


class Part(Protocol):
    """A field that takes the place of another."""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole field."""

    def pieces(self) -> Iterator[bytes]:
        """Yield the field piece by piece."""


Change = Callable[[Reader, Span, Field], Part | None]
"""What takes the place of a field of the graph, given with where it lies; None if it stays."""
Location = Callable[[str], str | None]
"""What a file of external data is called from now on, given what it was called; None if it stays."""
Runs = list[tuple[Span, bytes | None]]
"""A message as runs of the old file, each with what takes its place; None if it stays."""


def rebuild(path: Path, target: Path, change: Change, tick: Callable[[int], None]) -> None:
    """Write the file again; those beside it stay where they are, and the new one names them as before."""
    with reading(path) as reader, path.open("rb") as source, target.open("wb") as out:
        for whole, part in _plan(reader, change):
            if isinstance(part, bytes):
                out.write(part)
            elif part is None:
                _copy(source, whole, out)
            else:
                out.writelines(part.pieces())
            tick(whole.end - whole.begin)


def relocate(path: Path, location: Location) -> None:
    """Name the files of external data otherwise, in every tensor of a written model."""
    target = path.with_name(f"{path.name}.relocated")
    with reading(path) as reader, path.open("rb") as source, target.open("wb") as out:
        for run, part in _relocated(reader, reader.whole, "model", location, _MAX_MESSAGES) or [(reader.whole, None)]:
            if part is None:
                _copy(source, run, out)
            else:
                out.write(part)
    os.replace(target, path)


def _relocated(reader: Reader, span: Span, kind: str, location: Location, depth: int) -> Runs | None:
    """Return a message in which external data has other names; None if it stays as it is."""
    if kind == _ENTRY:
        return _entry(reader, span, location)
    runs: Runs = []
    for whole, field in fields(reader, span):
        inner = _INNER[kind].get(field.number) if field.wire == BYTES and depth else None
        found = _relocated(reader, place(field), inner, location, depth - 1) if inner else None
        if found is not None:
            nbytes = sum(run.end - run.begin if part is None else len(part) for run, part in found)
            runs += [(Span(whole.begin, field.begin), head(field.number, nbytes)), *found]
        elif runs and runs[-1][1] is None:
            runs[-1] = Span(runs[-1][0].begin, whole.end), None
        else:
            runs.append((whole, None))
    return runs if any(part is not None for _, part in runs) else None


def _entry(reader: Reader, span: Span, location: Location) -> Runs | None:
    texts = {field.number: protobuf.text(reader.data, field) for _, field in fields(reader, span)}
    found = location(texts.get(_VALUE, "")) if texts.get(_KEY) == _LOCATION else None
    if found is None:
        return None
    key, value = _LOCATION.encode(), found.encode()
    return [(span, head(_KEY, len(key)) + key + head(_VALUE, len(value)) + value)]


def fields(reader: Reader, message: Span) -> Iterator[tuple[Span, Field]]:
    """Yield every field of a message, known or not, and where it begins and ends with its tag."""
    begin = message.begin
    for field in protobuf.fields(reader.data, *message):
        yield Span(begin, field.end), field
        begin = field.end


def _plan(reader: Reader, change: Change) -> Iterator[tuple[Span, Part | bytes | None]]:
    """Yield runs of the old file, each with what takes its place."""
    for whole, field in fields(reader, reader.whole):
        if field.number != GRAPH:
            yield whole, None
            continue
        graph = [(inner, change(reader, inner, found)) for inner, found in fields(reader, place(field))]
        if all(part is None for _, part in graph):
            yield whole, None
            continue
        nbytes = sum(part.nbytes if part is not None else inner.end - inner.begin for inner, part in graph)
        yield Span(whole.begin, field.begin), head(GRAPH, nbytes)
        yield from graph


def _copy(source: BinaryIO, run: Span, out: BinaryIO) -> None:
    source.seek(run.begin)
    left = run.end - run.begin
    while left:
        with errors.reading(Path(source.name)):
            piece = source.read(min(_PIECE_BYTES, left))
        if not piece:
            raise InputError(f"{source.name} became shorter while it was copied")
        out.write(piece)
        left -= len(piece)
