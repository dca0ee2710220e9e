"""Matrices of calculated values multiplied: what is summed over goes from both at once."""

from __future__ import annotations

from enum import StrEnum

import numpy as np

from prunectl.channels.graph import Node
from prunectl.channels.labels import LabelArray, fixed
from prunectl.channels.rules_moving import first_along
from prunectl.channels.trace import Trace, blame


class Along(StrEnum):
    """Which axis of a matrix the channels lie on."""

    NONE = "none"
    FRONT = "front"
    """One channel for a whole matrix, as a head of an attention is."""
    KEPT = "kept"
    SUMMED = "summed"
    SEVERAL = "several"


def product(trace: Trace, node: Node) -> None:
    """Unite what is summed over together, and the matrices that meet."""
    shape = trace.shape(node.outputs[0])
    values = [_padded(trace.of(name), len(shape)) for name in node.inputs]
    if min(len(trace.shape(name)) for name in node.inputs) < 2:
        _lock(trace, node, *values)
        return
    one, other = values
    # Both with what is summed over on their last axis.
    turned = (one, other.swapaxes(-1, -2))
    along = [_along(trace, value) for value in turned]
    match along:
        case [Along.SUMMED, Along.SUMMED]:
            first, second = (first_along(value, -2) for value in turned)
            trace.labels.unite(first, second, blame(node))
            trace.values[node.outputs[0]] = fixed(shape)
        case [Along.FRONT, Along.FRONT]:
            _unite_fronts(trace, node, one, other)
            _put(trace, node, one[..., :1, :1], shape)
        case [Along.FRONT | Along.KEPT, Along.NONE]:
            _unite_fronts(trace, node, one, other)
            _put(trace, node, first_along(one, -1), shape)
        case [Along.NONE, Along.FRONT | Along.KEPT]:
            _unite_fronts(trace, node, one, other)
            _put(trace, node, first_along(other, -2), shape)
        case _:
            _lock(trace, node, one, other)


def _along(trace: Trace, value: LabelArray) -> Along:
    axes = trace.labels.varying(value)
    named = {value.ndim - 1: Along.SUMMED, value.ndim - 2: Along.KEPT}
    found = {named.get(axis, Along.FRONT) for axis in axes}
    return found.pop() if len(found) == 1 else Along.SEVERAL if found else Along.NONE


def _unite_fronts(trace: Trace, node: Node, one: LabelArray, other: LabelArray) -> None:
    """Unite the matrices that meet, unless there is one for all."""
    first, second = one[..., 0, 0], other[..., 0, 0]
    axes = {*trace.labels.varying(first), *trace.labels.varying(second)}
    if any(first.shape[axis] > 1 and second.shape[axis] > 1 for axis in axes):
        trace.labels.unite(first, second, blame(node))


def _lock(trace: Trace, node: Node, *values: LabelArray) -> None:
    for value in values:
        trace.labels.lock(value, f"{blame(node)} multiplies it by what is calculated")
    trace.values[node.outputs[0]] = fixed(trace.shape(node.outputs[0]))


def _put(trace: Trace, node: Node, labels: LabelArray, shape: tuple[int, ...]) -> None:
    trace.values[node.outputs[0]] = np.broadcast_to(labels, shape)


def _padded(labels: LabelArray, rank: int) -> LabelArray:
    return labels.reshape((1,) * (rank - labels.ndim) + labels.shape)
