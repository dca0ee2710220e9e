"""Matmuls and shapes of Keras layers over sequences: attention, and recurrent cells."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prunectl.formats import budgets
from prunectl.formats.base import Length, Shape
from prunectl.formats.keras.config import object_in, string_in, untuple
from prunectl.formats.keras.flops.shapes import LayerCall, Matmul, UnknownShapeError, scale_dim, window_output


def multi_head_attention(call: LayerCall) -> Iterator[Matmul]:
    """Yield the projections of multi-head attention (Vaswani 2017), then its products QK^T and AV."""
    query, key, value = _query_key_value(call)
    heads, width = call.number("num_heads"), call.number("key_dim")
    depth = call.number("value_dim", width)
    yield Matmul("query/kernel", (query[-1], heads, width), query[:-1])
    yield Matmul("key/kernel", (key[-1], heads, width), key[:-1], position=1)
    yield Matmul("value/kernel", (value[-1], heads, depth), value[:-1], position=2)
    yield Matmul("", (), (*query[:-1], *key[:-1], heads, width))
    yield Matmul("", (), (*query[:-1], *value[:-1], heads, depth))
    yield Matmul("output/kernel", (heads, depth, _multi_head_output(call)[-1]), query[:-1], position=3)


def grouped_query_attention(call: LayerCall) -> Iterator[Matmul]:
    """Yield the same for grouped-query attention (Ainslie 2023): query heads share key heads."""
    query, key, value = _query_key_value(call)
    heads, few, width = call.number("num_query_heads"), call.number("num_key_value_heads"), call.number("head_dim")
    yield Matmul("query/kernel", (query[-1], heads, width), query[:-1])
    yield Matmul("key/kernel", (key[-1], few, width), key[:-1], position=1)
    yield Matmul("value/kernel", (value[-1], few, width), value[:-1], position=2)
    for other in (key, value):
        yield Matmul("", (), (*query[:-1], *other[:-1], heads, width))
    yield Matmul("output/kernel", (heads, width, query[-1]), query[:-1], position=3)


def dot_product_attention(call: LayerCall) -> Iterator[Matmul]:
    """Yield the products QK^T and AV of an attention without projections."""
    query, value = call.shape(0), call.shape(1, "value")
    key = call.shape(2) if len(call.inputs) > 2 else value
    yield Matmul("", (), (*query, *key[-2:-1]))
    yield Matmul("", (), (*query[:-1], *value[-2:]))


def dot_product(call: LayerCall) -> Iterator[Matmul]:
    """Yield the contraction of two inputs along an axis of each."""
    _, contracted = _contracted(call)
    yield Matmul("", (), (*call.shape(0), *(length for axis, length in enumerate(call.shape(1)) if axis != contracted)))


def einsum(call: LayerCall) -> Iterator[Matmul]:
    """Yield the product of an Einstein sum of an input with a kernel."""
    input_labels, kernel_labels, output_labels = _labels(call)
    lengths = _lengths(call, input_labels, output_labels)
    yield Matmul(
        "kernel",
        tuple(lengths[label] for label in kernel_labels),
        tuple(lengths[label] for label in input_labels[1:] if label not in kernel_labels),
    )


def _query_key_value(call: LayerCall) -> tuple[Shape, Shape, Shape]:
    query, value = call.shape(0, "query"), call.shape(1, "value")
    has_key = len(call.inputs) > 2 or call.keywords.get("key") is not None
    return query, call.shape(2, "key") if has_key else value, value


def _multi_head_output(call: LayerCall) -> Shape:
    query = call.shape(0, "query")
    output_shape = untuple(call.config.get("output_shape"))
    if output_shape is None:
        return query
    last = [output_shape] if type(output_shape) is int else output_shape
    if not isinstance(last, list) or not all(type(length) is int for length in last):
        raise UnknownShapeError
    return (*query[:-1], *last)


def _same_as_query(call: LayerCall) -> Shape:
    return (*call.shape(0)[:-1], call.shape(1, "value")[-1])


def _contracted(call: LayerCall) -> tuple[int, int]:
    left, right = call.shape(0), call.shape(1)
    first, second = call.numbers("axes", 2)
    contracted = tuple(axis + len(shape) if axis < 0 else axis - 1 for axis, shape in ((first, left), (second, right)))
    if not 0 <= contracted[0] < len(left) or not 0 <= contracted[1] < len(right):
        raise UnknownShapeError
    return contracted[0], contracted[1]


def _dot_output(call: LayerCall) -> Shape:
    left, right = _contracted(call)
    remaining = tuple(
        length
        for shape, contracted in ((call.shape(0), left), (call.shape(1), right))
        for axis, length in enumerate(shape)
        if axis != contracted
    )
    return remaining or (1,)


def _labels(call: LayerCall) -> tuple[str, str, str]:
    """The labels of the input, of the kernel and of the output; dots are replaced by spare labels."""
    equation = call.config.get("equation")
    if not isinstance(equation, str) or len(equation) > budgets.MAX_EINSUM_LABELS:
        raise UnknownShapeError
    operands, _, output_labels = equation.replace(" ", "").partition("->")
    input_labels, _, kernel_labels = operands.partition(",")
    if "..." in input_labels:
        spare = (chr(0x100 + number) for number in range(budgets.MAX_EINSUM_LABELS))
        missing = len(call.shape()) + 1 - len(input_labels.replace("...", ""))
        dots = "".join(next(spare) for _ in range(min(max(missing, 0), budgets.MAX_EINSUM_LABELS - 1)))
        input_labels, output_labels = input_labels.replace("...", dots), output_labels.replace("...", dots)
    if (
        not input_labels
        or not output_labels
        or len(input_labels) != len(call.shape()) + 1
        or "." in input_labels + kernel_labels + output_labels
    ):
        raise UnknownShapeError
    return input_labels, kernel_labels, output_labels


def _lengths(call: LayerCall, input_labels: str, output_labels: str) -> dict[str, Length]:
    known: dict[str, Length] = dict(zip(input_labels[1:], call.shape(), strict=True))
    output_shape = untuple(call.config.get("output_shape"))
    output_lengths = (
        [output_shape] if type(output_shape) is int else output_shape if isinstance(output_shape, list) else []
    )
    # The output shape may leave out leading axes, which then are those of the input.
    for label, length in zip(reversed(output_labels), reversed(output_lengths), strict=False):
        if type(length) is int:
            known.setdefault(label, length)
            if known[label] is None:
                known[label] = length
    return _Lengths(known)


class _Lengths(dict[str, Length]):
    """Lengths by label; None for a label of unknown length."""

    def __missing__(self, label: str) -> Length:
        return None


def _einsum_output(call: LayerCall) -> Shape:
    input_labels, _, output_labels = _labels(call)
    lengths = _lengths(call, input_labels, output_labels)
    return tuple(lengths[label] for label in output_labels if label != input_labels[0])


GATES = {"LSTM": 4, "GRU": 3, "SimpleRNN": 1}
STATES = {"LSTM": 2, "GRU": 1, "SimpleRNN": 1}
CONV_LSTM = ("ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D")
_RECURRENT = (*GATES, "RNN", *CONV_LSTM)


def outputs(call: LayerCall, first: Shape | None) -> tuple[Shape | None, ...]:
    """The output of a recurrent layer, then its states under `return_state`."""
    if not call.flag("return_state"):
        return (first,)
    try:
        state = _state(call)
    except UnknownShapeError:
        state = None
    return (first, *(state,) * STATES.get(call.kind, 2))


def is_recurrent(kind: str) -> bool:
    """Whether layers of this class can return their states."""
    return kind in _RECURRENT


def recurrent_matmuls(call: LayerCall) -> Iterator[Matmul]:
    """Yield the products of LSTM, GRU and SimpleRNN."""
    time, width = _sequence(call)
    yield from _cell(call.kind, width, call.number("units"), (time,), 0)


def cell_matmuls(call: LayerCall) -> Iterator[Matmul]:
    """Yield the products of an `RNN` layer, cell by cell."""
    time, width = _sequence(call)
    for position, (kind, units) in enumerate(_cells(call)):
        yield from _cell(kind, width, units, (time,), position)
        width = units


def conv_lstm_matmuls(call: LayerCall) -> Iterator[Matmul]:
    """Yield the products of a ConvLSTM: two convolutions for each gate."""
    time, space, channels = _image_sequence(call)
    filters, kernel = call.number("filters"), call.numbers("kernel_size", len(space))
    output_space = _window_space(call, space)
    yield Matmul("kernel", (*kernel, channels, 4 * filters), (time, *output_space))
    yield Matmul("recurrent_kernel", (*kernel, filters, 4 * filters), (time, *output_space))


def _cell(kind: str, width: Length, units: int, times: Shape, position: int) -> Iterator[Matmul]:
    gates = GATES[kind]
    yield Matmul("kernel", (width, gates * units), times, gates=gates, position=position)
    yield Matmul("recurrent_kernel", (units, gates * units), times, gates=gates, position=position)


def _sequence(call: LayerCall) -> tuple[Length, Length]:
    shape = call.inputs[0] if call.inputs else None
    if shape is None:
        return None, None
    if len(shape) != 2:
        raise UnknownShapeError
    return shape[0], shape[1]


def _cells(call: LayerCall) -> tuple[tuple[str, int], ...]:
    cell = object_in(call.config, "cell")
    is_stacked = string_in(cell, "class_name") == "StackedRNNCells"
    listed = untuple(object_in(cell, "config").get("cells")) if is_stacked else [cell]
    if not isinstance(listed, list) or not 0 < len(listed) <= budgets.MAX_LAYER_WEIGHTS:
        raise UnknownShapeError
    cells = []
    for cell_config in listed:
        kind = string_in(cell_config, "class_name").removesuffix("Cell")
        if kind not in GATES:
            raise UnknownShapeError
        cells.append((kind, LayerCall(kind, object_in(cell_config, "config"), ()).number("units")))
    return tuple(cells)


def _image_sequence(call: LayerCall) -> tuple[Length, Shape, Length]:
    shape = call.inputs[0] if call.inputs else None
    if shape is None:
        return (None, *call.image())
    if not shape:
        raise UnknownShapeError
    return (shape[0], *call.image(shape[1:]))


def _window_space(call: LayerCall, space: Shape) -> Shape:
    return window_output(call, "kernel_size", 1, space)


def _state(call: LayerCall) -> Shape:
    if call.kind == "RNN":
        return (_cells(call)[-1][1],)
    if call.kind in GATES:
        return (call.number("units"),)
    _, space, _ = _image_sequence(call)
    return call.joined(_window_space(call, space), call.number("filters"))


def _output(call: LayerCall) -> Shape:
    state = _state(call)
    time = _image_sequence(call)[0] if call.kind.startswith("Conv") else _sequence(call)[0]
    if not call.flag("return_sequences"):
        return state
    return (time, *state)


def bidirectional_output(shape: Shape | None, call: LayerCall) -> Shape | None:
    """The output of a layer that runs both ways, its two outputs joined."""
    if shape is None:
        return None
    mode = call.word("merge_mode", "concat" if "merge_mode" not in call.config else "")
    if mode == "concat":
        return (*shape[:-1], scale_dim(shape[-1], 2))
    return shape


MATMULS: dict[str, Callable[[LayerCall], Iterator[Matmul]]] = {
    **dict.fromkeys(GATES, recurrent_matmuls),
    "RNN": cell_matmuls,
    **dict.fromkeys(CONV_LSTM, conv_lstm_matmuls),
    "MultiHeadAttention": multi_head_attention,
    "GroupQueryAttention": grouped_query_attention,
    "Attention": dot_product_attention,
    "AdditiveAttention": dot_product_attention,
    "Dot": dot_product,
    "EinsumDense": einsum,
}
SHAPES: dict[str, Callable[[LayerCall], Shape]] = {
    **dict.fromkeys(_RECURRENT, _output),
    "MultiHeadAttention": _multi_head_output,
    "GroupQueryAttention": lambda call: call.shape(0, "query"),
    "Attention": _same_as_query,
    "AdditiveAttention": _same_as_query,
    "Dot": _dot_output,
    "EinsumDense": _einsum_output,
}
