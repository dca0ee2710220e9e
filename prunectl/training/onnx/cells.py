"""Recurrent layers: their weights meet the inputs of every step, and the states before it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from prunectl.formats.base import Array
from prunectl.training.onnx import nodes, steps
from prunectl.training.onnx.look import Look, Ran
from prunectl.training.onnx.meetings import Meeting
from prunectl.training.sights import Use


def recurrent(meeting: Meeting) -> Look | None:
    """Return how the weights of a layer are seen; each direction is a group of its own."""
    node = meeting.node
    if len(meeting.shape) != 3 or nodes.setting(node, "layout", 0):
        return None
    use = Use(meeting.order[1], meeting.order[2], meeting.shape[0], meeting.order[0])
    if meeting.place == steps.KERNEL:
        return _of_data(meeting, use)
    if meeting.place == steps.RECURRENT:
        is_reset = node.op_type == "GRU" and not nodes.setting(node, "linear_before_reset", 0)
        return _of_reset(meeting, use) if is_reset else _of_states(meeting, use)
    return None


def _of_data(meeting: Meeting, use: Use) -> Look:
    def show(ran: Ran) -> Iterator[tuple[Array, Use]]:
        yield from _real(meeting, ran, steps.data(meeting.node, ran, use.groups), use)

    return Look(steps.given(meeting.node, steps.DATA, steps.LENGTHS), show)


def _of_states(meeting: Meeting, use: Use) -> Look:
    def show(ran: Ran) -> Iterator[tuple[Array, Use]]:
        yield from _real(meeting, ran, steps.states(meeting.node, ran), use)

    return Look(_needed(meeting), show)


def _of_reset(meeting: Meeting, use: Use) -> Look | None:
    """Return how a GRU is seen whose last gate meets the state as far as it is not reset."""
    node = meeting.node
    activations = nodes.setting(node, "activations", ("Sigmoid",))
    is_plain = use.groups == 1 and activations[0] == "Sigmoid" and nodes.setting(node, "clip", 0.0) == 0.0
    if not is_plain:
        return None
    rows, size = meeting.shape[1:]

    def show(ran: Ran) -> Iterator[tuple[Array, Use]]:
        before = steps.states(node, ran)
        yield from _real(meeting, ran, before, replace(use, outputs=(0, rows - size)))
        kept = before * _reset(meeting, ran, before)
        yield from _real(meeting, ran, kept, replace(use, outputs=(rows - size, rows)))

    return Look((*_needed(meeting), *steps.given(node, steps.KERNEL, steps.RECURRENT, steps.BIAS)), show)


def _reset(meeting: Meeting, ran: Ran, before: Array) -> Array:
    """Return how much of each state the reset gate, the second of three, lets through."""
    node, size = meeting.node, meeting.shape[2]
    gate = slice(size, 2 * size)
    kernel, recurrent = (ran[nodes.input_of(node, place)][0, gate] for place in (steps.KERNEL, steps.RECURRENT))
    total: Array = ran[nodes.input_of(node, steps.DATA)] @ kernel.T + before @ recurrent.T
    if name := nodes.input_of(node, steps.BIAS):
        total = total + ran[name][0].reshape(6, size)[[1, 4]].sum(axis=0)
    # By the tangent, which does not overflow.
    opened: Array = (1 + np.tanh(total / 2)) / 2
    return opened


def _needed(meeting: Meeting) -> tuple[str, ...]:
    known = steps.given(meeting.node, steps.DATA, steps.LENGTHS, steps.FIRST)
    return (*known, nodes.output_of(meeting.node, 0))


def _real(meeting: Meeting, ran: Ran, inputs: Array, use: Use) -> Iterator[tuple[Array, Use]]:
    found = steps.real(meeting.node, ran, inputs)
    if found is not None:
        yield found, use
