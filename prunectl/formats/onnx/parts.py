"""Nodes, attributes and tensors of an ONNX file: where their bytes lie, elements unread."""

from __future__ import annotations

from prunectl.formats.onnx.proto import RAW, Attribute, Node, Span, SparseProto, TensorProto
from prunectl.formats.onnx.wire import DOUBLES, FLOAT, FLOATS, LENGTH, NUMBER, NUMBERS, Reader, Schema, place
from prunectl.formats.protobuf import WireError

_NODE: Schema = dict.fromkeys((1, 2, 3, 4, 5, 7), LENGTH)
_ATTRIBUTE: Schema = {2: FLOAT, 3: NUMBER, 7: FLOATS, 8: NUMBERS, **dict.fromkeys((1, 4, 5, 6, 11, 22), LENGTH)}
_TENSOR: Schema = {
    **dict.fromkeys((3, 8, 9, 13), LENGTH),
    **dict.fromkeys((2, 14), NUMBER),
    **dict.fromkeys((1, 5, 7, 11), NUMBERS),
    4: FLOATS,
    10: DOUBLES,
}
_SPARSE: Schema = {1: LENGTH, 2: LENGTH, 3: NUMBERS}
_PAIR: Schema = {1: LENGTH, 2: LENGTH}
_CLASSICAL = "ai.onnx.ml"
_EXTERNAL = 1


def node(reader: Reader, span: Span) -> Node:
    """Return an operation."""
    inputs: list[str] = []
    outputs: list[str] = []
    spans: list[Span] = []
    texts = {3: "", 4: "", 7: ""}
    for at in reader.fields(span, _NODE, "a node"):
        match at.number:
            case 1:
                inputs.append(reader.text(at))
            case 2:
                outputs.append(reader.text(at))
            case 5:
                spans.append(place(at))
            case _:
                texts[at.number] = reader.text(at)
    if not texts[4]:
        raise WireError("a node names no operation")
    # The trees of classical models fill attributes with a million numbers, none of them a tensor.
    attributes = {} if texts[7] == _CLASSICAL else dict(_attribute(reader, at) for at in spans)
    return Node(texts[3], texts[4], texts[7], tuple(inputs), tuple(outputs), attributes)


def _attribute(reader: Reader, span: Span) -> tuple[str, Attribute]:
    name, text, number, real = "", "", 0, 0.0
    lists: dict[int, list[Span]] = {7: [], 8: [], 11: []}
    dense: TensorProto | None = None
    scattered: SparseProto | None = None
    for at in reader.fields(span, _ATTRIBUTE, "an attribute"):
        match at.number:
            case 1:
                name = reader.text(at)
            case 2:
                real = reader.real(at)
            case 3:
                number = at.value
            case 4:
                text = reader.shown(at)
            case 5:
                dense = tensor(reader, place(at))
            case 6:
                lists[11].append(place(at))
            case 22:
                scattered = sparse(reader, place(at))
            case _:
                lists[at.number].append(place(at))
    floats, ints, graphs = (tuple(found) for found in lists.values())
    return name, Attribute(number, real, text, ints, floats, dense, scattered, graphs)


def tensor(reader: Reader, span: Span) -> TensorProto:
    """Return what a tensor says of itself."""
    name, data_type, is_external, is_segment = "", 0, False, False
    dims: list[Span] = []
    data: dict[int, list[Span]] = {}
    external: dict[str, str] = {}
    for at in reader.fields(span, _TENSOR, "a tensor"):
        match at.number:
            case 1:
                dims.append(place(at))
            case 2:
                data_type = at.value
            case 3:
                is_segment = True
            case 8:
                name = reader.text(at)
            case 9:
                data[RAW] = [place(at)]
            case 13:
                key, value = _pair(reader, place(at))
                external[key] = value
            case 14:
                is_external = at.value == _EXTERNAL
            case _:
                data.setdefault(at.number, []).append(place(at))
    runs = {number: tuple(spans) for number, spans in data.items()}
    outside = external if is_external else None
    return TensorProto(name, reader.numbers(tuple(dims)), data_type, runs, outside, is_segment)


def sparse(reader: Reader, span: Span) -> SparseProto:
    """Return the parts of a tensor that is stored without its zeros."""
    parts = {1: TensorProto(), 2: TensorProto()}
    dims: list[Span] = []
    for at in reader.fields(span, _SPARSE, "a sparse tensor"):
        if at.number == 3:
            dims.append(place(at))
        else:
            parts[at.number] = tensor(reader, place(at))
    return SparseProto(parts[1], parts[2], reader.numbers(tuple(dims)))


def _pair(reader: Reader, span: Span) -> tuple[str, str]:
    texts = {1: "", 2: ""}
    for at in reader.fields(span, _PAIR, "a pair of texts"):
        texts[at.number] = reader.text(at)
    return texts[1], texts[2]
