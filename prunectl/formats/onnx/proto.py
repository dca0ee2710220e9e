"""The messages of an ONNX file that matter here, as plain values."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from prunectl import errors
from prunectl.errors import InputError
from prunectl.formats import budgets, protobuf
from prunectl.formats.protobuf import BYTES, FIXED32, FIXED64, VARINT, Field, WireError

FLOATS, INT32S, INT64S, RAW, DOUBLES, UINT64S = 4, 5, 7, 9, 10, 11
"""Fields of a tensor that hold its elements."""


class Span(NamedTuple):
    """Where a message lies."""

    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class TensorProto:
    """A tensor as the file words it."""

    name: str = ""
    dims: tuple[int, ...] = ()
    data_type: int = 0
    data: Mapping[int, tuple[Span, ...]] = field(default_factory=dict)
    """The runs of each field of elements."""
    external: Mapping[str, str] | None = None
    is_segment: bool = False


@dataclass(frozen=True, slots=True)
class SparseProto:
    """The values that are not zero, and their places."""

    values: TensorProto
    indices: TensorProto
    dims: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Attribute:
    """A setting of a node: whichever of these the file gives."""

    number: int = 0
    real: float = 0.0
    text: str = ""
    ints: tuple[Span, ...] = ()
    floats: tuple[Span, ...] = ()
    tensor: TensorProto | None = None
    sparse: SparseProto | None = None
    graphs: tuple[Span, ...] = ()


@dataclass(frozen=True, slots=True)
class NodeProto:
    """One operation of a graph."""

    name: str
    op: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Attribute]

    @property
    def label(self) -> str:
        """What to call it: its name, else that of its first output."""
        return self.name or next(iter(self.outputs), "") or self.op

    def number(self, name: str, default: int) -> int:
        """An attribute that is a whole number."""
        attribute = self.attributes.get(name)
        return default if attribute is None else attribute.number


@dataclass(frozen=True, slots=True)
class GraphProto:
    """Nodes and what they are given."""

    nodes: tuple[NodeProto, ...]
    initializers: tuple[TensorProto, ...] = ()
    sparse: tuple[SparseProto, ...] = ()
    values: tuple[Span, ...] = ()
    """What the file says of shapes: inputs, outputs and values between them."""


@dataclass(frozen=True, slots=True)
class Model:
    """What stands around the graph."""

    ir_version: int
    producer: str
    opsets: Mapping[str, int]
    graph: Span
    functions: tuple[Span, ...]
    training: tuple[Span, ...]


SHOWN_BYTES = 200
_BROKEN = 31

LENGTH, NUMBER = (BYTES,), (VARINT,)
NUMBERS, FLOAT, PACKED_FLOATS, PACKED_DOUBLES = (VARINT, BYTES), (FIXED32,), (FIXED32, BYTES), (FIXED64, BYTES)
"""A list of numbers may be packed or not, whatever its schema prefers."""

Schema = Mapping[int, tuple[int, ...]]


class ProtoReader:
    """Reads messages from one buffer, and stops when it holds more of them than a model would."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self._left = budgets.MAX_ONNX_FIELDS
        self._text_left = budgets.MAX_TEXTS_BYTES

    @property
    def whole(self) -> Span:
        """The outermost message."""
        return Span(0, len(self.data))

    def fields(self, span: Span, schema: Schema, what: str) -> Iterator[Field]:
        """Yield those fields of a message that a schema knows."""
        for entry in protobuf.fields(self.data, *span):
            self._left -= 1
            if self._left < 0:
                raise WireError(f"it has more than {budgets.MAX_ONNX_FIELDS} parts")
            wires = schema.get(entry.number)
            if wires is None:
                continue
            if entry.wire not in wires:
                raise WireError(f"field {entry.number} of {what} is of a wrong type")
            yield entry

    def text(self, field: Field) -> str:
        """Return a name."""
        if field.value > budgets.MAX_ONNX_NAME_BYTES:
            raise WireError(f"a name has {field.value} bytes")
        self._text_left -= field.value
        if self._text_left < 0:
            raise WireError(f"its names have more than {budgets.MAX_TEXTS_BYTES} bytes")
        text = protobuf.text(self.data, field)
        if len(text) > field.value:
            # Broken text takes longer to decode by as much.
            self._text_left -= _BROKEN * field.value
        return text

    def shown(self, field: Field) -> str:
        """Return the beginning of a text that may be long."""
        end = min(field.end, field.begin + SHOWN_BYTES)
        return str(self.data[field.begin : end], "utf-8", "replace") + ("…" if end < field.end else "")

    def real(self, field: Field) -> float:
        """Return a float field."""
        (value,) = struct.unpack("<f", field.value.to_bytes(4, "little"))
        return float(value)

    def numbers(self, spans: tuple[Span, ...]) -> tuple[int, ...]:
        """Return the whole numbers of a short list."""
        if sum(end - begin for begin, end in spans) > budgets.MAX_ONNX_LIST_BYTES:
            raise WireError("a list that should be short is long")
        numbers: list[int] = []
        for at, end in spans:
            begin = at
            while begin < end:
                number, begin = protobuf.read_varint(self.data, begin, end)
                numbers.append(protobuf.signed(number))
        return tuple(numbers)


def location(field: Field) -> Span:
    """Return where the payload of a field lies."""
    return Span(field.begin, field.end)


@contextmanager
def parsing(path: Path) -> Iterator[ProtoReader]:
    """Map a model into memory, so that only what is looked at is read."""
    with errors.reading(path), path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    # What is done with it may write, on a disk that is full: that is not this file's fault.
    try:
        with mapped, memoryview(mapped) as data:
            yield ProtoReader(data)
    except WireError as error:
        raise InputError(f"{path} is damaged, or not an ONNX model: {error}") from error
