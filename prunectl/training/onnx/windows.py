"""Convolutions: what is put around their inputs, or cut from what comes out, worked out for a size of input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from prunectl.formats.base import Array
from prunectl.training.onnx import nodes
from prunectl.training.onnx.look import Look, Ran
from prunectl.training.onnx.meetings import Meeting
from prunectl.training.sights import Use, Window

Pads = tuple[tuple[int, int], ...]
_SAME = ("SAME_UPPER", "SAME_LOWER")


def convolution(meeting: Meeting) -> Look | None:
    """Return how the kernel of a convolution is seen."""
    return _seen(meeting, is_transposed=False)


def transposed(meeting: Meeting) -> Look | None:
    """Return how the kernel of a transposed convolution is seen."""
    return _seen(meeting, is_transposed=True)


def _seen(meeting: Meeting, *, is_transposed: bool) -> Look | None:
    node, space = meeting.node, meeting.order[2:]
    # What is left of the axes is read in their order, whatever the layout of the file.
    if meeting.place != 1 or not space or list(space) != sorted(space):
        return None
    data, kernel = nodes.input_of(node, 0), meeting.shape[2:]
    ones = (1,) * len(kernel)
    strides, dilations = nodes.setting(node, "strides", ones), nodes.setting(node, "dilations", ones)
    reaches = tuple((size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True))
    groups = nodes.setting(node, "group", 1)
    out_axis, in_axis = (1, 0) if is_transposed else (0, 1)

    def show(ran: Ran) -> Iterator[tuple[Array, Use]]:
        inputs = ran.real(ran[data], 1)
        if inputs is None:
            return
        measure = _cut if is_transposed else _padded
        pads = measure(node, inputs.shape[2:], reaches, strides)
        window = Window(strides, dilations, pads, is_transposed)
        yield inputs, Use(meeting.order[out_axis], meeting.order[in_axis], groups, window=window)

    return Look((data,), show)


def _padded(node: Any, image: Sequence[int], reaches: Sequence[int], strides: Sequence[int]) -> Pads:
    """Return the zeros before and after each axis of an image."""
    padding = nodes.setting(node, "auto_pad", "NOTSET")
    if padding not in _SAME:
        return _explicit(node, len(image), padding)
    found = []
    for length, reach, stride in zip(image, reaches, strides, strict=True):
        total = max(0, (-(-length // stride) - 1) * stride + reach - length)
        found.append(_shared(total, is_more_behind=padding == "SAME_UPPER"))
    return tuple(found)


def _cut(node: Any, image: Sequence[int], reaches: Sequence[int], strides: Sequence[int]) -> Pads:
    """Return what is cut before and after each axis of the full result; less than nothing where some is added."""
    padding, axes = nodes.setting(node, "auto_pad", "NOTSET"), len(image)
    added = nodes.setting(node, "output_padding", (0,) * axes)
    asked = nodes.setting(node, "output_shape", ())[-axes:]
    if not asked and padding not in _SAME:
        pads = _explicit(node, axes, padding)
        return tuple((before, after - more) for (before, after), more in zip(pads, added, strict=True))
    found = []
    for axis, (length, reach, stride) in enumerate(zip(image, reaches, strides, strict=True)):
        full = (length - 1) * stride + reach
        total = full + added[axis] - (asked[axis] if asked else length * stride)
        before, after = _shared(max(0, total), is_more_behind=padding == "SAME_UPPER")
        found.append((before, full - asked[axis] - before if asked else after - added[axis]))
    return tuple(found)


def _explicit(node: Any, axes: int, padding: str) -> Pads:
    pads = nodes.setting(node, "pads", (0,) * 2 * axes) if padding != "VALID" else (0,) * 2 * axes
    return tuple(zip(pads[:axes], pads[axes:], strict=True))


def _shared(total: int, *, is_more_behind: bool) -> tuple[int, int]:
    less = total // 2
    return (less, total - less) if is_more_behind else (total - less, less)
