"""An ONNX graph without some channels: weights sliced, and what named their number set right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from prunectl.channels.after import After
from prunectl.channels.onnx import views
from prunectl.channels.onnx.numbers import renumber
from prunectl.channels.onnx.read import Opened
from prunectl.channels.onnx.shared import retie
from prunectl.channels.source import Removed, axes_of, sliced
from prunectl.formats.base import Array
from prunectl.formats.optional import require


def cut(source: Opened, removed: Removed, after: After, weights: Mapping[str, Array]) -> Any:
    """Return the message of the smaller model; everything else in it stays as it was."""
    proto = type(source.proto)()
    proto.CopyFrom(source.proto)
    shapes, places = {}, axes_of(removed)
    for name, slot in views.tensors(proto.graph):
        axes = places.get(name, {})
        if axes or name in weights:
            smaller = sliced(weights[name] if name in weights else source.graph.weights[name], axes)
            put(slot, smaller)
        if axes:
            shapes[name] = smaller.shape
    for port in proto.graph.input:
        if port.name in shapes:
            for axis, length in zip(port.type.tensor_type.shape.dim, shapes[port.name], strict=True):
                axis.dim_value = length
    renumber(proto, source, after)
    retie(proto, source.copies)
    _forget(proto.graph, {name for name, view in source.graph.views.items() if view.tensor in shapes}, after)
    return proto


def put(slot: Any, array: Array) -> None:
    """Give a tensor other numbers; its name, its type and what is said of it stay."""
    fresh = require("onnx.numpy_helper", extra="onnx").from_array(np.ascontiguousarray(array), slot.name)
    for name in ("dims", "raw_data", "float_data", "double_data", "int32_data"):
        slot.ClearField(name)
    slot.dims.extend(fresh.dims)
    slot.raw_data = fresh.raw_data


def _forget(graph: Any, stale: set[str], after: After) -> None:
    """Leave out the shapes of inner values that no longer hold."""
    kept = [port for port in graph.value_info if port.name not in stale and not after.has_changed(port.name)]
    del graph.value_info[:]
    graph.value_info.extend(kept)
