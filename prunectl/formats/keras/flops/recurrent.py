"""Recurrent Keras layers: output shapes, states, and the matrix products of every time step."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prunectl.formats import budgets
from prunectl.formats.base import Length, Shape
from prunectl.formats.keras.config import part, text
from prunectl.formats.keras.flops.shapes import LayerCall, Matmul, UnknownShapeError, scale_dim, untuple
from prunectl.formats.keras.flops.windows import window_output

GATES = {"LSTM": 4, "GRU": 3, "SimpleRNN": 1}
_STATES = {"LSTM": 2, "GRU": 1, "SimpleRNN": 1}


def outputs(step: LayerCall, first: Shape | None) -> tuple[Shape | None, ...]:
    """The output of a recurrent layer, then its states under `return_state`."""
    if not step.flag("return_state"):
        return (first,)
    try:
        state = _state(step)
    except UnknownShapeError:
        state = None
    return (first, *(state,) * _STATES.get(step.kind, 2))


def is_recurrent(kind: str) -> bool:
    """Whether layers of this class can return their states."""
    return kind in RULES


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


RULES: dict[str, Callable[[LayerCall], Shape]] = dict.fromkeys(
    (*GATES, "RNN", "ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D"), _output
)
