"""Matmuls and shapes of Keras layers over sequences: attention, and recurrent cells."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prunectl.formats import budgets
from prunectl.formats.base import Length, Shape
from prunectl.formats.keras.config import part, text, untuple
from prunectl.formats.keras.flops.shapes import LayerCall, Matmul, UnknownShapeError, scale_dim, window_output


def multi_head_attention(step: LayerCall) -> Iterator[Matmul]:
    """Yield the projections of multi-head attention (Vaswani 2017), then its products QK^T and AV."""
    query, key, value = _query_key_value(step)
    heads, width = step.number("num_heads"), step.number("key_dim")
    depth = step.number("value_dim", width)
    yield Matmul("query/kernel", (query[-1], heads, width), query[:-1])
    yield Matmul("key/kernel", (key[-1], heads, width), key[:-1], position=1)
    yield Matmul("value/kernel", (value[-1], heads, depth), value[:-1], position=2)
    yield Matmul("", (), (*query[:-1], *key[:-1], heads, width))
    yield Matmul("", (), (*query[:-1], *value[:-1], heads, depth))
    yield Matmul("output/kernel", (heads, depth, _multi_head_output(step)[-1]), query[:-1], position=3)


def grouped_query_attention(step: LayerCall) -> Iterator[Matmul]:
    """Yield the same for grouped-query attention (Ainslie 2023): query heads share key heads."""
    query, key, value = _query_key_value(step)
    heads, few, width = step.number("num_query_heads"), step.number("num_key_value_heads"), step.number("head_dim")
    yield Matmul("query/kernel", (query[-1], heads, width), query[:-1])
    yield Matmul("key/kernel", (key[-1], few, width), key[:-1], position=1)
    yield Matmul("value/kernel", (value[-1], few, width), value[:-1], position=2)
    for other in (key, value):
        yield Matmul("", (), (*query[:-1], *other[:-1], heads, width))
    yield Matmul("output/kernel", (heads, width, query[-1]), query[:-1], position=3)


def dot_product_attention(step: LayerCall) -> Iterator[Matmul]:
    """Yield the products QK^T and AV of an attention without projections."""
    query, value = step.shape(0), step.shape(1, "value")
    key = step.shape(2) if len(step.inputs) > 2 else value
    yield Matmul("", (), (*query, *key[-2:-1]))
    yield Matmul("", (), (*query[:-1], *value[-2:]))


def dot_product(step: LayerCall) -> Iterator[Matmul]:
    """Yield the contraction of two inputs along an axis of each."""
    _, contracted = _contracted(step)
    yield Matmul("", (), (*step.shape(0), *(length for axis, length in enumerate(step.shape(1)) if axis != contracted)))


def einsum(step: LayerCall) -> Iterator[Matmul]:
    """Yield the product of an Einstein sum: every label runs once."""
    input_labels, kernel_labels, output_labels = _labels(step)
    lengths = _lengths(step, input_labels, output_labels)
    yield Matmul(
        "kernel",
        tuple(lengths[label] for label in kernel_labels),
        tuple(lengths[label] for label in input_labels[1:] if label not in kernel_labels),
    )


def _query_key_value(step: LayerCall) -> tuple[Shape, Shape, Shape]:
    query, value = step.shape(0, "query"), step.shape(1, "value")
    has_key = len(step.inputs) > 2 or step.keywords.get("key") is not None
    return query, step.shape(2, "key") if has_key else value, value


def _multi_head_output(step: LayerCall) -> Shape:
    query = step.shape(0, "query")
    output_shape = untuple(step.config.get("output_shape"))
    if output_shape is None:
        return query
    last = [output_shape] if type(output_shape) is int else output_shape
    if not isinstance(last, list) or not all(type(length) is int for length in last):
        raise UnknownShapeError
    return (*query[:-1], *last)


def _same_as_query(step: LayerCall) -> Shape:
    return (*step.shape(0)[:-1], step.shape(1, "value")[-1])


def _contracted(step: LayerCall) -> tuple[int, int]:
    left, right = step.shape(0), step.shape(1)
    first, second = step.numbers("axes", 2)
    contracted = tuple(axis + len(shape) if axis < 0 else axis - 1 for axis, shape in ((first, left), (second, right)))
    if not 0 <= contracted[0] < len(left) or not 0 <= contracted[1] < len(right):
        raise UnknownShapeError
    return contracted[0], contracted[1]


def _dot_output(step: LayerCall) -> Shape:
    left, right = _contracted(step)
    remaining = tuple(
        length
        for shape, contracted in ((step.shape(0), left), (step.shape(1), right))
        for axis, length in enumerate(shape)
        if axis != contracted
    )
    return remaining or (1,)


def _labels(step: LayerCall) -> tuple[str, str, str]:
    """The labels of the input, of the kernel and of the output, dots replaced by labels of their own."""
    equation = step.config.get("equation")
    if not isinstance(equation, str) or len(equation) > budgets.MAX_EINSUM_LABELS:
        raise UnknownShapeError
    operands, _, output_labels = equation.replace(" ", "").partition("->")
    input_labels, _, kernel_labels = operands.partition(",")
    if "..." in input_labels:
        spare = (chr(0x100 + number) for number in range(budgets.MAX_EINSUM_LABELS))
        missing = len(step.shape()) + 1 - len(input_labels.replace("...", ""))
        dots = "".join(next(spare) for _ in range(min(max(missing, 0), budgets.MAX_EINSUM_LABELS - 1)))
        input_labels, output_labels = input_labels.replace("...", dots), output_labels.replace("...", dots)
    if (
        not input_labels
        or not output_labels
        or len(input_labels) != len(step.shape()) + 1
        or "." in input_labels + kernel_labels + output_labels
    ):
        raise UnknownShapeError
    return input_labels, kernel_labels, output_labels


def _lengths(step: LayerCall, input_labels: str, output_labels: str) -> dict[str, Length]:
    known: dict[str, Length] = dict(zip(input_labels[1:], step.shape(), strict=True))
    output_shape = untuple(step.config.get("output_shape"))
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
    """Lengths by label; of a label that nobody explained it is unknown."""

    def __missing__(self, label: str) -> Length:
        return None


def _einsum_output(step: LayerCall) -> Shape:
    input_labels, _, output_labels = _labels(step)
    lengths = _lengths(step, input_labels, output_labels)
    return tuple(lengths[label] for label in output_labels if label != input_labels[0])


GATES = {"LSTM": 4, "GRU": 3, "SimpleRNN": 1}
STATES = {"LSTM": 2, "GRU": 1, "SimpleRNN": 1}
_CONVOLUTIONAL = ("ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D")
_RECURRENT = (*GATES, "RNN", *_CONVOLUTIONAL)


def outputs(step: LayerCall, first: Shape | None) -> tuple[Shape | None, ...]:
    """The output of a recurrent layer, then its states under `return_state`."""
    if not step.flag("return_state"):
        return (first,)
    try:
        state = _state(step)
    except UnknownShapeError:
        state = None
    return (first, *(state,) * STATES.get(step.kind, 2))


def is_recurrent(kind: str) -> bool:
    """Whether layers of this class can return their states."""
    return kind in _RECURRENT


def recurrent_matmuls(step: LayerCall) -> Iterator[Matmul]:
    """Yield the products of LSTM, GRU and SimpleRNN."""
    time, width = _sequence(step)
    yield from _cell(step.kind, width, step.number("units"), (time,), 0)


def cell_matmuls(step: LayerCall) -> Iterator[Matmul]:
    """Yield the products of an `RNN` layer, cell by cell."""
    time, width = _sequence(step)
    for position, (kind, units) in enumerate(_cells(step)):
        yield from _cell(kind, width, units, (time,), position)
        width = units


def conv_lstm_matmuls(step: LayerCall) -> Iterator[Matmul]:
    """Yield the products of a ConvLSTM: two convolutions for each gate."""
    time, space, channels = _image_sequence(step)
    filters, kernel = step.number("filters"), step.numbers("kernel_size", len(space))
    left = _window_space(step, space)
    yield Matmul("kernel", (*kernel, channels, 4 * filters), (time, *left))
    yield Matmul("recurrent_kernel", (*kernel, filters, 4 * filters), (time, *left))


def _cell(kind: str, width: Length, units: int, times: Shape, position: int) -> Iterator[Matmul]:
    gates = GATES[kind]
    yield Matmul("kernel", (width, gates * units), times, gates=gates, position=position)
    yield Matmul("recurrent_kernel", (units, gates * units), times, gates=gates, position=position)


def _sequence(step: LayerCall) -> tuple[Length, Length]:
    shape = step.inputs[0] if step.inputs else None
    if shape is None:
        return None, None
    if len(shape) != 2:
        raise UnknownShapeError
    return shape[0], shape[1]


def _cells(step: LayerCall) -> tuple[tuple[str, int], ...]:
    cell = part(step.config, "cell")
    listed = untuple(part(cell, "config").get("cells")) if text(cell, "class_name") == "StackedRNNCells" else [cell]
    if not isinstance(listed, list) or not 0 < len(listed) <= budgets.MAX_LAYER_WEIGHTS:
        raise UnknownShapeError
    cells = []
    for cell_config in listed:
        kind = text(cell_config, "class_name").removesuffix("Cell")
        if kind not in GATES:
            raise UnknownShapeError
        cells.append((kind, LayerCall(kind, part(cell_config, "config"), ()).number("units")))
    return tuple(cells)


def _image_sequence(step: LayerCall) -> tuple[Length, Shape, Length]:
    shape = step.inputs[0] if step.inputs else None
    if shape is None:
        return (None, *step.image())
    if not shape:
        raise UnknownShapeError
    return (shape[0], *step.image(shape[1:]))


def _window_space(step: LayerCall, space: Shape) -> Shape:
    return window_output(step, "kernel_size", 1, space)


def _state(step: LayerCall) -> Shape:
    if step.kind == "RNN":
        return (_cells(step)[-1][1],)
    if step.kind in GATES:
        return (step.number("units"),)
    _, space, _ = _image_sequence(step)
    return step.joined(_window_space(step, space), step.number("filters"))


def _output(step: LayerCall) -> Shape:
    state = _state(step)
    time = _image_sequence(step)[0] if step.kind.startswith("Conv") else _sequence(step)[0]
    if not step.flag("return_sequences"):
        return state
    return (time, *state)


def bidirectional_output(shape: Shape | None, step: LayerCall) -> Shape | None:
    """The output of a layer that runs both ways, its two outputs joined."""
    if shape is None:
        return None
    mode = step.word("merge_mode", "concat" if "merge_mode" not in step.config else "")
    if mode == "concat":
        return (*shape[:-1], scale_dim(shape[-1], 2))
    return shape


MATMULS: dict[str, Callable[[LayerCall], Iterator[Matmul]]] = {
    **dict.fromkeys(GATES, recurrent_matmuls),
    "RNN": cell_matmuls,
    **dict.fromkeys(_CONVOLUTIONAL, conv_lstm_matmuls),
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
    "GroupQueryAttention": lambda step: step.shape(0, "query"),
    "Attention": _same_as_query,
    "AdditiveAttention": _same_as_query,
    "Dot": _dot_output,
    "EinsumDense": _einsum_output,
}
