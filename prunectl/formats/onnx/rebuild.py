"""An ONNX file written again with some fields of its graph in another form, all others byte for byte."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from prunectl import errors
from prunectl.errors import InputError
from prunectl.formats import protobuf
from prunectl.formats.onnx.proto import Span
from prunectl.formats.onnx.wire import Reader, place, reading
from prunectl.formats.protobuf import Field
from prunectl.formats.protobuf_write import head

GRAPH = 7
_PIECE_BYTES = 1 << 20


class Part(Protocol):
    """A field that takes the place of another."""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole field."""

    def pieces(self) -> Iterator[bytes]:
        """Yield the field piece by piece."""


Change = Callable[[Reader, Span, Field], Part | None]
"""What takes the place of a field of the graph, given with where it lies; None if it stays."""


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
