"""Products of matrices: a weight on the right or on the left."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from prunectl.formats.base import Array
from prunectl.training.onnx import nodes
from prunectl.training.onnx.look import Look, Ran
from prunectl.training.onnx.meetings import Meeting
from prunectl.training.sights import Use


def gemm(meeting: Meeting) -> Look | None:
    """Return how a matrix is seen in a product that may turn its sides and scale what comes out."""
    node = meeting.node
    if meeting.place > 1 or len(meeting.shape) != 2 or _is_mixed(node):
        return None
    turns = bool(nodes.setting(node, "transA", 0)), bool(nodes.setting(node, "transB", 0))
    is_right = meeting.place == 1
    # Features stand last in what is left of a weight, and first in what is right of it.
    in_axis = int(turns[1]) if is_right else 1 - int(turns[0])
    is_turned = turns[0] if is_right else not turns[1]
    use = Use(out_axis=meeting.order[1 - in_axis], in_axis=meeting.order[in_axis])
    data, scale = nodes.input_of(node, 1 - meeting.place), nodes.setting(node, "alpha", 1.0)

    def show(ran: Ran) -> Iterator[tuple[Array, Use]]:
        inputs = _turned(ran[data]) if is_turned else ran[data]
        # The sum is scaled as a whole, which is the same as scaling what goes in.
        yield from _real(ran, inputs if scale == 1.0 else inputs * np.float32(scale), use)

    return Look((data,), show)


def matmul(meeting: Meeting) -> Look | None:
    """Return how a matrix is seen in a plain product, or a stack of matrices, each with its own inputs."""
    is_right = meeting.place == 1
    data, rank = nodes.input_of(meeting.node, 1 - meeting.place), len(meeting.shape)
    if rank not in {2, 3}:
        return None
    in_axis, out_axis = (rank - 2, rank - 1) if is_right else (rank - 1, rank - 2)
    groups = meeting.shape[0] if rank == 3 else 1
    group_axis = meeting.order[0] if rank == 3 else None
    use = Use(meeting.order[out_axis], meeting.order[in_axis], groups, group_axis)

    def show(ran: Ran) -> Iterator[tuple[Array, Use]]:
        inputs = ran[data] if is_right or ran[data].ndim == 1 else _turned(ran[data])
        yield from _real(ran, inputs if groups == 1 else _side_by_side(inputs, groups), use)

    return Look((data,), show)


def _is_mixed(node: Any) -> bool:
    """Whether a fused product also swaps the batch with the rows."""
    return bool(nodes.setting(node, "transBatchA", 0) or nodes.setting(node, "transBatchB", 0))


def _turned(inputs: Array) -> Array:
    return np.swapaxes(inputs, -1, -2)


def _side_by_side(inputs: Array, groups: int) -> Array:
    """Return the inputs of each matrix of a stack as runs of one feature axis."""
    stacked = np.broadcast_to(inputs, (*inputs.shape[:-3], groups, *np.atleast_2d(inputs).shape[-2:]))
    rows, features = stacked.shape[-2:]
    return np.moveaxis(stacked, -3, -2).reshape(*stacked.shape[:-3], rows, groups * features)


def _real(ran: Ran, inputs: Array, use: Use) -> Iterator[tuple[Array, Use]]:
    real = ran.real(inputs, inputs.ndim - 1)
    if real is not None:
        yield real, use
