"""The graph of an ONNX file and what stands around it, read one level at a time."""

from __future__ import annotations

from prunectl.formats.onnx import parts
from prunectl.formats.onnx.proto import Graph, Model, Node, Span, SparseProto, TensorProto
from prunectl.formats.onnx.wire import LENGTH, NUMBER, Reader, Schema, place
from prunectl.formats.protobuf import WireError, signed

_MODEL: Schema = {1: NUMBER, **dict.fromkeys((2, 3, 7, 8, 14, 20, 25), LENGTH)}
_GRAPH: Schema = dict.fromkeys((1, 5, 11, 12, 13, 15), LENGTH)
_FUNCTION: Schema = dict.fromkeys((1, 7, 10), LENGTH)
_TRAINING: Schema = dict.fromkeys((1, 2), LENGTH)
_PAIR: Schema = {1: LENGTH, 2: LENGTH}
_OPSET: Schema = {1: LENGTH, 2: NUMBER}
_FIRST_WITH_OPSETS = 3
"""Version of the format from which a model must say which operators it means."""


def model(reader: Reader) -> Model:
    """Return what stands around the graph."""
    version, names, opsets = 0, {2: "", 3: ""}, {}
    inner: dict[int, list[Span]] = {7: [], 20: [], 25: []}
    for at in reader.fields(reader.whole, _MODEL, "the model"):
        match at.number:
            case 1:
                version = at.value
            case 2 | 3:
                names[at.number] = reader.text(at)
            case 8:
                domain, number = _opset(reader, place(at))
                opsets[domain] = number
            case 14:
                pass  # what the writer noted for himself
            case _:
                inner[at.number].append(place(at))
    if len(inner[7]) != 1:
        raise WireError("it has more than one graph" if inner[7] else "it has no graph")
    if not opsets and version >= _FIRST_WITH_OPSETS:
        raise WireError("it names no set of operators")
    producer = " ".join(name for name in names.values() if name)
    return Model(version, producer, opsets, inner[7][0], tuple(inner[25]), tuple(inner[20]))


def graph(reader: Reader, span: Span) -> Graph:
    """Return the nodes and tensors of a graph; graphs inside its nodes stay unread."""
    nodes: list[Node] = []
    initializers: list[TensorProto] = []
    sparse: list[SparseProto] = []
    values: list[Span] = []
    for at in reader.fields(span, _GRAPH, "a graph"):
        match at.number:
            case 1:
                nodes.append(parts.node(reader, place(at)))
            case 5:
                initializers.append(parts.tensor(reader, place(at)))
            case 15:
                sparse.append(parts.sparse(reader, place(at)))
            case _:
                values.append(place(at))
    return Graph(tuple(nodes), tuple(initializers), tuple(sparse), tuple(values))


def function(reader: Reader, span: Span) -> tuple[str, str, Graph]:
    """Return the domain, the name and the nodes of a function."""
    texts, nodes = {1: "", 10: ""}, []
    for at in reader.fields(span, _FUNCTION, "a function"):
        if at.number == 7:
            nodes.append(parts.node(reader, place(at)))
        else:
            texts[at.number] = reader.text(at)
    return texts[10], texts[1], Graph(tuple(nodes))


def training(reader: Reader, span: Span) -> tuple[Span, ...]:
    """Return the graphs that initialise and train a model."""
    return tuple(place(at) for at in reader.fields(span, _TRAINING, "the training"))


def _opset(reader: Reader, span: Span) -> tuple[str, int]:
    domain, version = "", 0
    for at in reader.fields(span, _OPSET, "a set of operators"):
        if at.number == 1:
            domain = reader.text(at)
        else:
            version = at.value
    return domain, version


def value(reader: Reader, span: Span) -> tuple[str, tuple[int, ...] | None]:
    """Return the name and the shape of a value, a first axis that the file leaves open counted as 1."""
    name, shape = "", None
    for at in reader.fields(span, _PAIR, "a value"):
        if at.number == 1:
            name = reader.text(at)
        else:
            shape = _shape(reader, place(at))
    return name, shape


def _shape(reader: Reader, span: Span) -> tuple[int, ...] | None:
    lengths: list[int] | None = None
    for of_type in reader.fields(span, {1: LENGTH}, "a type"):
        for of_shape in reader.fields(place(of_type), {2: LENGTH}, "a type"):
            lengths = [_length(reader, place(at)) for at in reader.fields(place(of_shape), {1: LENGTH}, "a shape")]
    if lengths and lengths[0] < 1:
        lengths[0] = 1
    return None if lengths is None or any(length < 0 for length in lengths) else tuple(lengths)


def _length(reader: Reader, span: Span) -> int:
    lengths = [signed(at.value) for at in reader.fields(span, {1: NUMBER}, "an axis")]
    return lengths[-1] if lengths else -1
