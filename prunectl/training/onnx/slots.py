"""Where the numbers of each tensor go in the message that onnxruntime is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from prunectl.formats.base import Array, Tensor
from prunectl.formats.onnx.dtypes import CODES
from prunectl.formats.onnx.roles import CELLS
from prunectl.formats.optional import require
from prunectl.training.onnx import nodes
from prunectl.training.onnx.places import Place, places

INLINE_BYTES = 1 << 12
"""Up to this a tensor stays in the message, where onnxruntime looks for shapes and axes."""
_LISTED_BEFORE = 4
"""Version of the format before which a tensor had to be listed among the inputs."""
_TENSOR, _EXTERNAL = 4, 1
_STATES = "prunectl/states_"


@dataclass(frozen=True, slots=True)
class Slots:
    """The tensors of a message by their names in the model."""

    inside: Mapping[str, Any]
    """Those whose numbers it holds."""
    outside: frozenset[str]
    """Those whose numbers are given beside it: they are not copied, and a message has no room for 2 GB."""
    main: frozenset[str]
    """Those of the main graph."""


def settle(proto: Any, tensors: Mapping[str, Tensor]) -> Slots:
    """Let every tensor be dense, each of the main graph an initializer, large ones outside; none is filled."""
    inside, outside, main = {}, set(), set()
    for place in list(places(proto)):
        tensor = tensors.get(place.name)
        if tensor is None:
            continue
        slot = _slot(place)
        slot.Clear()
        slot.name, slot.data_type = place.inner, place.data_type
        slot.dims.extend(tensor.shape)
        if place.is_main:
            main.add(place.name)
        if place.is_main and tensor.nbytes > INLINE_BYTES and _is_plain(tensor):
            outside.add(place.name)
            _refer(slot, tensor)
        else:
            inside[place.name] = slot
    proto.ClearField("training_info")
    _delist(proto, main)
    _name_states(proto.graph)
    return Slots(inside, frozenset(outside), frozenset(main))


def fill(slot: Any, array: Array) -> None:
    """Write the numbers of a tensor into the message."""
    if CODES[slot.data_type].bits >= 8:
        slot.raw_data = np.ascontiguousarray(array).tobytes()
        return
    packed = require("onnx.numpy_helper", extra="onnx").from_array(array)
    slot.raw_data = packed.raw_data


def _slot(place: Place) -> Any:
    """Return an empty message of a tensor in the place of what was there."""
    if place.node is None and place.dense is not None:
        return place.dense
    if place.node is None:
        place.scope.sparse_initializer.remove(place.sparse)
        return place.scope.initializer.add()
    if place.is_main:
        place.scope.node.remove(place.node)
        return place.scope.initializer.add()
    del place.node.attribute[:]
    attribute = place.node.attribute.add()
    attribute.name, attribute.type = "value", _TENSOR
    return attribute.t


def _is_plain(tensor: Tensor) -> bool:
    """Whether NumPy itself knows its numbers, as onnxruntime asks of what it is given."""
    return tensor.dtype.isbuiltin == 1 and tensor.dtype.kind in "fiu"


def _refer(slot: Any, tensor: Tensor) -> None:
    """Mark a tensor as one that is given beside the message; the file that is named is never looked for."""
    slot.data_location = _EXTERNAL
    for key, value in (("location", "beside"), ("offset", "0"), ("length", str(tensor.nbytes))):
        entry = slot.external_data.add()
        entry.key, entry.value = key, value


def _delist(proto: Any, main: set[str]) -> None:
    """Leave only what really goes in among the inputs."""
    proto.ir_version = max(proto.ir_version, _LISTED_BEFORE)
    given = [port for port in proto.graph.input if port.name not in main]
    del proto.graph.input[:]
    proto.graph.input.extend(given)


def _name_states(graph: Any) -> None:
    """Let every recurrent layer give its states, which its weights meet one step later."""
    for number, node in enumerate(graph.node):
        if node.op_type in CELLS and not nodes.output_of(node, 0):
            rest = list(node.output[1:])
            del node.output[:]
            node.output.extend([f"{_STATES}{number}", *rest])
