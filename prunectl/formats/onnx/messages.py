"""Parse the messages of an ONNX file that prunectl needs; tensor elements are only located, not read."""

from __future__ import annotations

import dataclasses
import mmap
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from prunectl import errors
from prunectl.errors import InputError
from prunectl.formats import budgets, protobuf
from prunectl.formats.protobuf import BYTES, FIXED32, FIXED64, VARINT, Field, WireError, signed

FLOATS, INT32S, INT64S, RAW, DOUBLES, UINT64S = 4, 5, 7, 9, 10, 11
"""Fields of a TensorProto that contain its elements."""


class Span(NamedTuple):
    """The byte range of a message in the file."""

    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class TensorProto:
    """A TensorProto, with its elements as byte ranges."""

    name: str = ""
    dims: tuple[int, ...] = ()
    data_type: int = 0
    data: Mapping[int, tuple[Span, ...]] = dataclasses.field(default_factory=dict)
    """The byte ranges of each field with elements, by field number."""
    external: Mapping[str, str] | None = None
    is_segment: bool = False


@dataclass(frozen=True, slots=True)
class SparseProto:
    """A sparse tensor: its nonzero values and their indices."""

    values: TensorProto
    indices: TensorProto
    dims: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Attribute:
    """An attribute of a node; only the fields that the file gives are set."""

    number: int = 0
    real: float = 0.0
    text: str = ""
    ints: tuple[Span, ...] = ()
    floats: tuple[Span, ...] = ()
    tensor: TensorProto | None = None
    sparse: SparseProto | None = None
    graphs: tuple[Span, ...] = ()
    reference: str = ""
    """Inside a function, the attribute of the calling node that supplies the value (`ref_attr_name`)."""


@dataclass(frozen=True, slots=True)
class NodeProto:
    """One operation of a graph."""

    name: str
    op: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Attribute]
    overload: str = ""
    """The overload of the function that it calls, where several functions have the same name."""
    is_resolved: bool = True
    """Whether all attributes have values, so that none depends on a call of the enclosing function."""

    @property
    def operator(self) -> str:
        """The full name of its operation: domain, type and overload."""
        return ":".join(filter(None, (f"{self.domain}.{self.op}", self.overload)))

    @property
    def label(self) -> str:
        """The node's name, else that of its first output, else its type."""
        return self.name or next(iter(self.outputs), "") or self.op

    def number(self, name: str, default: int) -> int:
        """The value of an integer attribute."""
        attribute = self.attributes.get(name)
        return default if attribute is None else attribute.number


@dataclass(frozen=True, slots=True)
class GraphProto:
    """The nodes and tensors of a graph."""

    nodes: tuple[NodeProto, ...]
    initializers: tuple[TensorProto, ...] = ()
    sparse: tuple[SparseProto, ...] = ()
    values: tuple[Span, ...] = ()
    """ValueInfoProto messages, which declare shapes: of inputs, outputs and values between them."""


@dataclass(frozen=True, slots=True)
class Model:
    """A ModelProto, with its graphs as byte ranges."""

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
"""Wire types of fields; a list of numbers may be packed or not, whatever the schema prefers."""

Schema = Mapping[int, tuple[int, ...]]


class ProtoReader:
    """Reads messages from one buffer, up to a maximal number of fields and bytes of text."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self._left = budgets.MAX_ONNX_FIELDS
        self._text_left = budgets.MAX_TEXTS_BYTES

    @property
    def whole(self) -> Span:
        """The outermost message."""
        return Span(0, len(self.data))

    def fields(self, span: Span, schema: Schema, what: str) -> Iterator[Field]:
        """Yield the fields of a message that are in the schema; WireError if one has another wire type."""
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
        """The string in a field; WireError if it exceeds the limits on names."""
        if field.value > budgets.MAX_ONNX_NAME_BYTES:
            raise WireError(f"a name has {field.value} bytes")
        self._text_left -= field.value
        if self._text_left < 0:
            raise WireError(f"its names have more than {budgets.MAX_TEXTS_BYTES} bytes")
        text = protobuf.text(self.data, field)
        if len(text) > field.value:
            # Text that is not UTF-8 counts more, because it takes that much longer to decode.
            self._text_left -= _BROKEN * field.value
        return text

    def shown(self, field: Field) -> str:
        """The first SHOWN_BYTES of a text that may be long."""
        end = min(field.end, field.begin + SHOWN_BYTES)
        return str(self.data[field.begin : end], "utf-8", "replace") + ("…" if end < field.end else "")

    def real(self, field: Field) -> float:
        """A float field."""
        (value,) = struct.unpack("<f", field.value.to_bytes(4, "little"))
        return float(value)

    def numbers(self, spans: tuple[Span, ...]) -> tuple[int, ...]:
        """The integers of a short list."""
        if sum(end - begin for begin, end in spans) > budgets.MAX_ONNX_LIST_BYTES:
            raise WireError("a list is longer than prunectl allows")
        numbers: list[int] = []
        for begin, end in spans:
            offset = begin
            while offset < end:
                number, offset = protobuf.read_varint(self.data, offset, end)
                numbers.append(protobuf.signed(number))
        return tuple(numbers)


def location(field: Field) -> Span:
    """The byte range of a field's payload."""
    return Span(field.begin, field.end)


@contextmanager
def parsing(path: Path) -> Iterator[ProtoReader]:
    """Memory-map a model, so that only the parts that are parsed are read."""
    with errors.reading(path), path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    # Outside `errors.reading`: the block may write, and an error such as a full disk is not about this file.
    try:
        with mapped, memoryview(mapped) as data:
            yield ProtoReader(data)
    except WireError as error:
        raise InputError(f"{path} is damaged, or not an ONNX model: {error}") from error


_NODE: Schema = dict.fromkeys((1, 2, 3, 4, 5, 7, 8), LENGTH)
_ATTRIBUTE: Schema = {
    2: FLOAT,
    3: NUMBER,
    7: PACKED_FLOATS,
    8: NUMBERS,
    **dict.fromkeys((1, 4, 5, 6, 11, 21, 22), LENGTH),
}
_TENSOR: Schema = {
    **dict.fromkeys((3, 8, 9, 13), LENGTH),
    **dict.fromkeys((2, 14), NUMBER),
    **dict.fromkeys((1, 5, 7, 11), NUMBERS),
    4: PACKED_FLOATS,
    10: PACKED_DOUBLES,
}
_SPARSE: Schema = {1: LENGTH, 2: LENGTH, 3: NUMBERS}
_PAIR: Schema = {1: LENGTH, 2: LENGTH}
_CLASSICAL = "ai.onnx.ml"
_EXTERNAL = 1


def node(reader: ProtoReader, span: Span) -> NodeProto:
    """Parse a NodeProto."""
    inputs: list[str] = []
    outputs: list[str] = []
    spans: list[Span] = []
    texts = {3: "", 4: "", 7: "", 8: ""}
    for field in reader.fields(span, _NODE, "a node"):
        match field.number:
            case 1:
                inputs.append(reader.text(field))
            case 2:
                outputs.append(reader.text(field))
            case 5:
                spans.append(location(field))
            case _:
                texts[field.number] = reader.text(field)
    if not texts[4]:
        raise WireError("a node has no operation")
    # Tree models of ai.onnx.ml have millions of numbers in attributes, none of which is a tensor.
    attributes = {} if texts[7] == _CLASSICAL else dict(_attribute(reader, field) for field in spans)
    is_resolved = not any(attribute.reference for attribute in attributes.values())
    return NodeProto(texts[3], texts[4], texts[7], tuple(inputs), tuple(outputs), attributes, texts[8], is_resolved)


def _attribute(reader: ProtoReader, span: Span) -> tuple[str, Attribute]:
    name, text, reference, number, real = "", "", "", 0, 0.0
    lists: dict[int, list[Span]] = {7: [], 8: [], 11: []}
    dense: TensorProto | None = None
    scattered: SparseProto | None = None
    for field in reader.fields(span, _ATTRIBUTE, "an attribute"):
        match field.number:
            case 1:
                name = reader.text(field)
            case 2:
                real = reader.real(field)
            case 3:
                number = field.value
            case 4:
                text = reader.shown(field)
            case 5:
                dense = tensor(reader, location(field))
            case 6:
                lists[11].append(location(field))
            case 21:
                reference = reader.text(field)
            case 22:
                scattered = read_sparse(reader, location(field))
            case _:
                lists[field.number].append(location(field))
    floats, ints, graphs = (tuple(spans) for spans in lists.values())
    return name, Attribute(number, real, text, ints, floats, dense, scattered, graphs, reference)


def tensor(reader: ProtoReader, span: Span) -> TensorProto:
    """Parse a TensorProto, without its elements."""
    name, data_type, is_external, is_segment = "", 0, False, False
    dims: list[Span] = []
    data: dict[int, list[Span]] = {}
    external: dict[str, str] = {}
    for field in reader.fields(span, _TENSOR, "a tensor"):
        match field.number:
            case 1:
                dims.append(location(field))
            case 2:
                data_type = field.value
            case 3:
                is_segment = True
            case 8:
                name = reader.text(field)
            case 9:
                data[RAW] = [location(field)]
            case 13:
                key, value = _pair(reader, location(field))
                external[key] = value
            case 14:
                is_external = field.value == _EXTERNAL
            case _:
                data.setdefault(field.number, []).append(location(field))
    runs = {number: tuple(spans) for number, spans in data.items()}
    outside = external if is_external else None
    return TensorProto(name, reader.numbers(tuple(dims)), data_type, runs, outside, is_segment)


def read_sparse(reader: ProtoReader, span: Span) -> SparseProto:
    """Parse a SparseTensorProto."""
    parts = {1: TensorProto(), 2: TensorProto()}
    dims: list[Span] = []
    for field in reader.fields(span, _SPARSE, "a sparse tensor"):
        if field.number == 3:
            dims.append(location(field))
        else:
            parts[field.number] = tensor(reader, location(field))
    return SparseProto(parts[1], parts[2], reader.numbers(tuple(dims)))


def _pair(reader: ProtoReader, span: Span) -> tuple[str, str]:
    texts = {1: "", 2: ""}
    for field in reader.fields(span, _PAIR, "a pair of texts"):
        texts[field.number] = reader.text(field)
    return texts[1], texts[2]


_MODEL: Schema = {1: NUMBER, **dict.fromkeys((2, 3, 7, 8, 14, 20, 25), LENGTH)}
_GRAPH: Schema = dict.fromkeys((1, 5, 11, 12, 13, 15), LENGTH)
_FUNCTION: Schema = dict.fromkeys((1, 4, 5, 7, 10, 11, 13), LENGTH)
_TRAINING: Schema = dict.fromkeys((1, 2), LENGTH)

_OPSET: Schema = {1: LENGTH, 2: NUMBER}
_FIRST_WITH_OPSETS = 3
"""The first IR version in which a model must declare its opsets."""


def model(reader: ProtoReader) -> Model:
    """Parse the ModelProto, without its graphs."""
    version, names, opsets = 0, {2: "", 3: ""}, {}
    inner: dict[int, list[Span]] = {7: [], 20: [], 25: []}
    for field in reader.fields(reader.whole, _MODEL, "the model"):
        match field.number:
            case 1:
                version = field.value
            case 2 | 3:
                names[field.number] = reader.text(field)
            case 8:
                domain, number = _opset(reader, location(field))
                opsets[domain] = number
            case 14:
                pass  # metadata of the writer
            case _:
                inner[field.number].append(location(field))
    if len(inner[7]) != 1:
        raise WireError("it has more than one graph" if inner[7] else "it has no graph")
    if not opsets and version >= _FIRST_WITH_OPSETS:
        raise WireError("it names no opset")
    producer = " ".join(name for name in names.values() if name)
    return Model(version, producer, opsets, inner[7][0], tuple(inner[25]), tuple(inner[20]))


def graph(reader: ProtoReader, span: Span) -> GraphProto:
    """Parse a GraphProto; subgraphs in attributes of its nodes are only located."""
    nodes: list[NodeProto] = []
    initializers: list[TensorProto] = []
    sparse: list[SparseProto] = []
    values: list[Span] = []
    for field in reader.fields(span, _GRAPH, "a graph"):
        match field.number:
            case 1:
                nodes.append(node(reader, location(field)))
            case 5:
                initializers.append(tensor(reader, location(field)))
            case 15:
                sparse.append(read_sparse(reader, location(field)))
            case _:
                values.append(location(field))
    return GraphProto(tuple(nodes), tuple(initializers), tuple(sparse), tuple(values))


def function(reader: ProtoReader, span: Span) -> tuple[NodeProto, GraphProto]:
    """Parse a FunctionProto: its signature as a node with the default attributes, and its body as a graph."""
    texts, nodes, defaults = {1: "", 10: "", 13: ""}, [], []
    names: dict[int, list[str]] = {4: [], 5: []}
    for field in reader.fields(span, _FUNCTION, "a function"):
        match field.number:
            case 4 | 5:
                names[field.number].append(reader.text(field))
            case 7:
                nodes.append(node(reader, location(field)))
            case 11:
                defaults.append(_attribute(reader, location(field)))
            case _:
                texts[field.number] = reader.text(field)
    call = NodeProto("", texts[1], texts[10], tuple(names[4]), tuple(names[5]), dict(defaults), texts[13])
    return call, GraphProto(tuple(nodes))


def training(reader: ProtoReader, span: Span) -> tuple[Span, ...]:
    """The byte ranges of the graphs that initialise and train a model."""
    return tuple(location(field) for field in reader.fields(span, _TRAINING, "the training"))


def _opset(reader: ProtoReader, span: Span) -> tuple[str, int]:
    domain, version = "", 0
    for field in reader.fields(span, _OPSET, "a set of operators"):
        if field.number == 1:
            domain = reader.text(field)
        else:
            version = field.value
    return domain, version


def value(reader: ProtoReader, span: Span) -> tuple[str, tuple[int, ...] | None]:
    """The name and the shape of a ValueInfoProto; a first axis of unknown length counts as 1."""
    name, shape = "", None
    for field in reader.fields(span, _PAIR, "a value"):
        if field.number == 1:
            name = reader.text(field)
        else:
            shape = _shape(reader, location(field))
    return name, shape


def _shape(reader: ProtoReader, span: Span) -> tuple[int, ...] | None:
    lengths: list[int] | None = None
    for of_type in reader.fields(span, {1: LENGTH}, "a type"):
        for of_shape in reader.fields(location(of_type), {2: LENGTH}, "a type"):
            lengths = [
                _length(reader, location(field)) for field in reader.fields(location(of_shape), {1: LENGTH}, "a shape")
            ]
    if lengths and lengths[0] < 1:
        lengths[0] = 1
    return None if lengths is None or any(length < 0 for length in lengths) else tuple(lengths)


def _length(reader: ProtoReader, span: Span) -> int:
    lengths = [signed(field.value) for field in reader.fields(span, {1: NUMBER}, "an axis")]
    return lengths[-1] if lengths else -1
