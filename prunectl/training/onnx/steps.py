"""The steps of a recurrent layer: which there are, what goes into them, and the states before them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunectl.formats.base import Array
from prunectl.training.onnx import nodes
from prunectl.training.onnx.look import Ran

DATA, KERNEL, RECURRENT, BIAS, LENGTHS, FIRST = 0, 1, 2, 3, 4, 5
"""Numbers of the inputs."""


def given(node: Any, *places: int) -> tuple[str, ...]:
    """Return the names of those inputs that are not left out."""
    return tuple(name for name in (nodes.input_of(node, place) for place in places) if name)


def real(node: Any, ran: Ran, inputs: Array) -> Array | None:
    """Return what goes into those steps that a sequence has; their first axes become one if some are short."""
    steps, batch = ran[nodes.input_of(node, DATA)].shape[:2]
    lengths = _lengths(node, ran)
    if ran.ran is not None:
        if batch % ran.ran:
            return None
        lengths[batch // ran.ran * ran.count :] = 0
    is_real = np.arange(steps)[:, None] < lengths
    return inputs if is_real.all() else inputs[is_real]


def data(node: Any, ran: Ran, directions: int) -> Array:
    """Return the inputs of each step, once for each direction."""
    found = ran[nodes.input_of(node, DATA)]
    return found if directions == 1 else np.concatenate([found] * directions, axis=-1)


def states(node: Any, ran: Ran) -> Array:
    """Return the state before each step, those of the directions side by side."""
    after = ran[nodes.output_of(node, 0)]
    steps, directions, batch, size = after.shape
    first = np.zeros((directions, batch, size), np.float32)
    if name := nodes.input_of(node, FIRST):
        first = ran[name]
    before = np.empty((steps, batch, directions, size), np.float32)
    for number in range(directions):
        is_back = number == 1 or nodes.setting(node, "direction", "forward") == "reverse"
        shifted = _backward if is_back else _forward
        before[:, :, number] = shifted(after[:, number], first[number], _lengths(node, ran))
    return before.reshape(steps, batch, directions * size)


def _forward(after: Array, first: Array, _: NDArray[np.int64]) -> Array:
    return np.concatenate([first[None], after[:-1]])


def _backward(after: Array, first: Array, lengths: NDArray[np.int64]) -> Array:
    """Begin with the last step that a sequence has."""
    before = np.concatenate([after[1:], first[None]])
    before[lengths - 1, np.arange(len(lengths))] = first
    return before


def _lengths(node: Any, ran: Ran) -> NDArray[np.int64]:
    name = nodes.input_of(node, LENGTHS)
    steps, batch = ran[nodes.input_of(node, DATA)].shape[:2]
    return np.array(ran[name], np.int64) if name else np.full(batch, steps, np.int64)
