"""What the kernels of products of matrices meet: dense layers, products by an equation, recurrent cells."""

from __future__ import annotations

import math
from collections.abc import Iterator
from string import ascii_letters
from typing import Any

import numpy as np

from prunectl.training.keras import numbers
from prunectl.training.keras.sights.meeting import Call, Meeting
from prunectl.training.network import Array
from prunectl.training.sights import Use

_PLAIN = Use(out_axis=1, in_axis=0)


def dense(call: Call) -> Iterator[Meeting]:
    """A dense layer multiplies the last axis."""
    yield Meeting(call.layer.kernel, call.inputs[0], _PLAIN)


def by_equation(call: Call) -> Iterator[Meeting]:
    """A product by what is contracted, such as the heads of attention; an axis that is not makes groups."""
    x = call.inputs[0]
    first, kernel, last = _terms(call.layer.equation, x.ndim)
    if any(len(set(term)) != len(term) for term in (first, kernel, last)) or not set(first) <= {*kernel, *last}:
        return
    size = numbers.shape(call.layer.kernel)
    plain = _as_a_matrix(first, kernel, last, size)
    if plain is not None:
        yield Meeting(call.layer.kernel, x.reshape(*x.shape[: -plain[1]], -1), plain[0])
        return
    contracted = [one for one in kernel if one in first and one not in last]
    shared = [one for one in kernel if one in first and one in last]
    made = [one for one in kernel if one not in first]
    grouping = shared + made[:-1]
    if len(contracted) != 1 or not made or len(grouping) > 1:
        return
    rest = [one for one in first if one not in {*contracted, *shared}]
    x = x.transpose([first.index(one) for one in (*rest, *shared, *contracted)])
    sizes = dict(zip(kernel, size, strict=True))
    groups = sizes[grouping[0]] if grouping else 1
    if grouping and not shared:
        # An axis that the inputs do not have, as that of attention heads: each group has the same inputs.
        x = np.broadcast_to(x[..., np.newaxis, :], (*x.shape[:-1], groups, x.shape[-1]))
    use = Use(
        out_axis=kernel.index(made[-1]),
        in_axis=kernel.index(contracted[0]),
        groups=groups,
        group_axis=kernel.index(grouping[0]) if grouping else None,
    )
    yield Meeting(call.layer.kernel, x.reshape(*x.shape[: len(rest)], -1), use)


def _as_a_matrix(first: str, kernel: str, last: str, size: tuple[int, ...]) -> tuple[Use, int] | None:
    """Return how a kernel is a matrix of what is contracted by what is made, and how many axes are contracted."""
    contracted = "".join(one for one in kernel if one in first and one not in last)
    made = "".join(one for one in kernel if one not in first)
    if not contracted or not made or not first.endswith(contracted) or not last.endswith(made):
        return None
    inputs = math.prod(size[kernel.index(one)] for one in contracted)
    outputs = math.prod(size[kernel.index(one)] for one in made)
    if kernel == contracted + made:
        return Use(out_axis=1, in_axis=0, shape=(inputs, outputs)), len(contracted)
    if kernel == made + contracted:
        return Use(out_axis=0, in_axis=1, shape=(outputs, inputs)), len(contracted)
    return None


def _terms(equation: str, axes: int) -> tuple[str, str, str]:
    """Return the letters of inputs, kernel and outputs, with some for the axes that dots stand for."""
    operands, last = equation.replace(" ", "").split("->")
    first, kernel = operands.split(",")
    unused = [one for one in ascii_letters if one not in equation]
    dots = "".join(unused[: axes - len(first.replace("...", ""))])
    return first.replace("...", dots), kernel, last.replace("...", dots)


def recurrent(call: Call) -> Iterator[Meeting]:
    """The cell of a simple recurrent layer or an LSTM: one kernel for the inputs, one for the state."""
    x, state = call.inputs[:2]
    yield Meeting(call.layer.kernel, x, _PLAIN)
    yield Meeting(call.layer.recurrent_kernel, state, _PLAIN)


def gated(call: Call) -> Iterator[Meeting]:
    """The cell of a GRU; an older kind resets the state before the candidate's columns meet it."""
    cell = call.layer
    if cell.reset_after:
        yield from recurrent(call)
        return
    (x, state), units = call.inputs[:2], int(cell.units)
    yield Meeting(cell.kernel, x, _PLAIN)
    yield Meeting(cell.recurrent_kernel, state, Use(1, 0, outputs=(0, 2 * units)))
    reset = _gate(call, x, state, slice(units, 2 * units))
    yield Meeting(cell.recurrent_kernel, reset * state, Use(1, 0, outputs=(2 * units, 3 * units)))


def _gate(call: Call, x: Array, state: Array, columns: slice) -> Array:
    cell = call.layer

    def of(variable: Any) -> Array:
        return numbers.read(call.library, variable)[..., columns].astype(np.float32)

    before = x @ of(cell.kernel) + state @ of(cell.recurrent_kernel)
    if cell.use_bias:
        before = before + of(cell.bias)
    if call.library.is_two:
        return np.asarray(cell.recurrent_activation(call.library.tensorflow.constant(before)))
    ops = call.library.keras.ops
    found: Array = ops.convert_to_numpy(cell.recurrent_activation(ops.convert_to_tensor(before)))
    return found
