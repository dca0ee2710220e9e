"""Recurrent Keras layers: one direction, or both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prunectl.channels.graph import Kind
from prunectl.channels.keras.activations import is_steady
from prunectl.channels.keras.called import Called
from prunectl.formats.keras.config import part, text
from prunectl.formats.keras.dialect import modern_kind, modern_settings
from prunectl.formats.keras.recurrent import GATES
from prunectl.formats.keras.shapes import UnknownShapeError

WORDS = frozenset({"initial_state"})
_STATES = {"LSTM": 2, "GRU": 1, "SimpleRNN": 1}
_REFUSED = ("stateful", "time_major")
"""Settings under which a layer begins with what it was left with, or has its steps in front of its examples."""
_MERGED = ("sum", "mul", "ave")
_RANK = 3


def recurrent(call: Called) -> tuple[str, ...]:
    """A layer that goes through the steps in time."""
    return _direction(call, call.step.kind, call.step.config, "", call.inputs[1:])


def both(call: Called) -> tuple[str, ...]:
    """Two layers, of which the second goes through the steps from behind; the file may describe it or not."""
    config, begun = call.step.config, call.inputs[1:]
    forward = part(config, "layer")
    backward = part(config, "backward_layer") or forward
    ways = []
    for way, found, states in (
        ("forward", forward, begun[: len(begun) // 2]),
        ("backward", backward, begun[len(begun) // 2 :]),
    ):
        kind = modern_kind(text(found, "class_name"))
        ways.append(_direction(call, kind, modern_settings(kind, part(found, "config")), way, states))
    (first, *left), (second, *more) = ways
    shape, other = call.shape(first), call.shape(second)
    said = config.get("merge_mode", "concat")
    if said is None:
        return (first, second, *left, *more)
    if said == "concat":
        wide = (*shape[:-1], shape[-1] + other[-1])
        merged = call.does(Kind.CONCAT, (first, second), wide, axis=len(shape) - 1)
    elif said in _MERGED and shape == other:
        merged = call.does(Kind.EACH, (first, second), shape)
    else:
        raise UnknownShapeError
    return (merged, *left, *more)


def _direction(
    call: Called, kind: str, config: Mapping[str, Any], way: str, states: tuple[str, ...]
) -> tuple[str, ...]:
    """Put in a layer in one direction, and return what it gives."""
    if kind not in GATES or any(config.get(key) for key in _REFUSED) or not is_steady(config):
        raise UnknownShapeError
    front = f"{way}/" if way else ""
    inner, data = call.leaves[f"{front}recurrent_kernel"], call.shape(call.inputs[0])
    units, gates = inner.shape[0], GATES[kind]
    bias = call.leaves.get(f"{front}bias")
    if (
        len(data) != _RANK
        or call.leaves[f"{front}kernel"].shape != (data[-1], gates * units)
        or inner.shape != (units, gates * units)
        or (bias is not None and bias.shape not in {(gates * units,), (2, gates * units), (2 * gates * units,)})
        or [call.shape(state) for state in states] not in ([], [(data[0], units)] * _STATES[kind])
    ):
        raise UnknownShapeError
    inputs = (
        call.inputs[0],
        call.weight(f"{front}kernel", (1, 0)),
        call.weight(f"{front}recurrent_kernel", (1, 0)),
        "" if bias is None else call.weight(f"{front}bias", range(len(bias.shape))),
        *states,
    )
    out = (*data[:-1], units) if config.get("return_sequences") else (data[0], units)
    more = ((data[0], units),) * (_STATES[kind] if config.get("return_state") else 0)
    name = f"{call.name}/{way}" if way else call.name
    return call.net.add(name, kind, Kind.RECURRENT, inputs, (out, *more), units=units, gates=gates)
