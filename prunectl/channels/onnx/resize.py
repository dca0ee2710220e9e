"""Numbers of channels that stand in an ONNX graph by themselves: in shapes, sizes, splits and groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prunectl.channels.adapter import PrunedShapes, RemovedIndices, delete_indices, removed_by_tensor
from prunectl.channels.graph import OpNode
from prunectl.channels.onnx.graph import LoadedOnnx, reshare
from prunectl.formats.base import Array
from prunectl.formats.safe_json import require
from prunectl.graphs.onnx.nodes import STANDARD_DOMAINS, find_attribute, get_attribute, input_of, names_read
from prunectl.graphs.onnx.tensors import OnnxNetwork, graph_tensors

_BACK = -(1 << 31)
"""Where a slice ends that runs backwards to the first."""
_UNLISTED = 4
"""Version of the format from which initializers are no inputs."""
_RECURRENT = frozenset({"LSTM", "GRU", "RNN"})
_STATES = (5, 6)
"""Where a recurrent layer is given its first states."""
_SHAPE_AT = {"Reshape": 1, "Expand": 1, "Resize": 3}


def update_onnx_sizes(proto: Any, loaded: LoadedOnnx, after: PrunedShapes) -> None:
    """Set right what names a number of channels that is no longer true."""
    sizes = _SizeConstants(proto, loaded, after)
    for node in list(proto.graph.node):
        if node.domain not in STANDARD_DOMAINS or not any(map(after.has_changed, (*node.input, *node.output))):
            continue
        if node.op_type in {"Conv", "ConvTranspose"}:
            sizes.groups(node)
        elif node.op_type in _RECURRENT:
            sizes.units(node)
        elif node.op_type == "Split":
            sizes.split(node)
        elif node.op_type == "Slice":
            sizes.slice(node, next(known for known in loaded.graph.nodes if known.outputs == tuple(node.output)))
        elif node.op_type in _SHAPE_AT and len(node.input) > _SHAPE_AT[node.op_type]:
            sizes.shape(node, _SHAPE_AT[node.op_type])
    sizes.remove_unused()


class _SizeConstants:
    """A graph whose constants are replaced one by one: several nodes may share one."""

    def __init__(self, proto: Any, loaded: LoadedOnnx, after: PrunedShapes) -> None:
        self._graph = proto.graph
        self._is_listed = proto.ir_version < _UNLISTED
        self._constants = loaded.static.constants
        self._shapes = loaded.graph.shapes
        self._after = after
        self._makers = {name: node for node in proto.graph.node for name in node.output}
        self._replaced: set[str] = set()
        self._count = 0

    def groups(self, node: Any) -> None:
        """A convolution channel by channel has as many groups as channels."""
        groups = get_attribute(node, "group", 1)
        if groups > 1 and groups == self._shapes[node.input[0]][1]:
            find_attribute(node, "group").i = self._after.shape(node.input[0])[1]

    def units(self, node: Any) -> None:
        """A recurrent layer names its units, and may begin with as many zeros."""
        name = next(filter(None, node.output))
        if (units := find_attribute(node, "hidden_size")) is not None:
            units.i = self._after.shape(name)[-1]
        for position in _STATES:
            state = input_of(node, position)
            if state in self._constants and not self._constants[state].any():
                # Without a first state it begins with zeros.
                node.input[position] = ""
                self._replaced.add(state)

    def split(self, node: Any) -> None:
        """Say the size of each part, unless they are equal still."""
        axis = get_attribute(node, "axis", 0) % len(self._shapes[node.input[0]])
        sizes = [self._after.shape(name)[axis] for name in node.output]
        if (listed := find_attribute(node, "split")) is not None:
            listed.ints[:] = sizes
        elif input_of(node, 1):
            self._replace_constant(node, 1, sizes)
        elif len(set(sizes)) > 1:
            if (num_outputs := find_attribute(node, "num_outputs")) is not None:
                node.attribute.remove(num_outputs)
            del node.input[1:]
            node.input.append(self._new_constant("sizes", np.array(sizes, np.int64)))

    def slice(self, node: Any, op: OpNode) -> None:
        """Count only the channels that are left before a part and in it."""
        old, new = self._shapes[node.input[0]], self._after.shape(node.input[0])
        starts: list[int] = []
        stops: list[int] = []
        for axis, start, stop, _ in op.attributes.get("slices", ()):
            moved = old[axis] != new[axis]
            starts.append(self._after.num_kept_before(node.input[0], axis, start) if moved else start)
            stops.append(self._after.num_kept_before(node.input[0], axis, stop) if moved else stop)
        if not any(old[axis] != new[axis] for axis, *_ in op.attributes.get("slices", ())):
            return
        for position, (name, bounds) in enumerate((("starts", starts), ("ends", stops)), 1):
            if (listed := find_attribute(node, name)) is not None:
                listed.ints[:] = bounds
            else:
                self._replace_constant(node, position, [_BACK if number < 0 else number for number in bounds])

    def shape(self, node: Any, position: int) -> None:
        """Say the new shape where the old one was said."""
        constant = self._constants.get(node.input[position])
        if constant is None or not constant.size:
            return
        old, new = self._shapes[node.output[0]], self._after.shape(node.output[0])
        axes = get_attribute(node, "axes", tuple(range(constant.size)))
        # What is copied or worked out, as 0 and -1 ask for, is so from what is there now.
        lengths = [
            new[axis] if number == old[axis] and number > 0 else number
            for axis, number in zip(axes, map(int, constant), strict=True)
        ]
        if lengths != list(map(int, constant)):
            self._update_constant(node, position, lengths)

    def remove_unused(self) -> None:
        """Remove what only made the numbers that were replaced."""
        waiting = list(self._replaced)
        for name in waiting:
            read = {name for node in self._graph.node for name in names_read(node)}
            if name in read or name in {port.name for port in (*self._graph.output, *self._graph.input)}:
                continue
            for tensor in [tensor for tensor in self._graph.initializer if tensor.name == name]:
                self._graph.initializer.remove(tensor)
            for node in [node for node in self._graph.node if list(node.output) == [name]]:
                waiting += node.input
                self._graph.node.remove(node)

    def _update_constant(self, node: Any, position: int, lengths: Sequence[int]) -> None:
        name = node.input[position]
        maker = self._makers.get(name)
        if self._is_static(name):
            self._replace_constant(node, position, lengths)
        elif maker is not None and maker.op_type in {"Cast", "Identity"}:
            self._update_constant(maker, 0, lengths)
        elif maker is not None and maker.op_type == "Concat":
            # What is measured while it runs is right by itself; what stands there is not.
            begin = 0
            for number, part in enumerate(list(maker.input)):
                end = begin + self._constants[part].size
                if list(map(int, self._constants[part])) != list(lengths[begin:end]) and self._is_static(part):
                    self._update_constant(maker, number, lengths[begin:end])
                begin = end

    def _replace_constant(self, node: Any, position: int, lengths: Sequence[int]) -> None:
        name = node.input[position]
        node.input[position] = self._new_constant(name, np.array(lengths, self._constants[name].dtype))
        self._replaced.add(name)

    def _is_static(self, name: str) -> bool:
        """Whether a constant depends on no shape of a value."""
        maker = self._makers.get(name)
        if maker is None:
            return name in self._constants
        return maker.op_type == "Constant" or (
            maker.op_type not in {"Shape", "Size"} and all(map(self._is_static, filter(None, maker.input)))
        )

    def _new_constant(self, like: str, lengths: Array) -> str:
        taken = {tensor.name for tensor in self._graph.initializer} | self._makers.keys()
        name = like
        while name in taken:
            self._count += 1
            name = f"{like}_{self._count}"
        onnx = require("onnx", extra="onnx")
        tensor = onnx.numpy_helper.from_array(lengths, name)
        self._graph.initializer.append(tensor)
        if self._is_listed:
            self._graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, lengths.shape))
        return name


def prune_model(
    loaded: LoadedOnnx, removed: RemovedIndices, after: PrunedShapes, weights: Mapping[str, Array]
) -> OnnxNetwork:
    """The smaller model; everything else in it stays as it was."""
    network = loaded.network.copy()
    proto = network.proto
    shapes, removed_by_name = {}, removed_by_tensor(removed)
    for tensor in graph_tensors(proto.graph):
        name, axes = tensor.name, removed_by_name.get(tensor.name, {})
        if axes or name in weights:
            array = delete_indices(weights[name] if name in weights else loaded.graph.weights[name], axes)
            network.assign(tensor.dense, array)
        if axes:
            shapes[name] = array.shape
    for port in proto.graph.input:
        if port.name in shapes:
            for axis, length in zip(port.type.tensor_type.shape.dim, shapes[port.name], strict=True):
                axis.dim_value = length
    update_onnx_sizes(proto, loaded, after)
    reshare(proto, loaded.copied_from)
    _drop_stale_shapes(proto.graph, {name for name, view in loaded.graph.views.items() if view.tensor in shapes}, after)
    return network


def _drop_stale_shapes(graph: Any, stale: set[str], after: PrunedShapes) -> None:
    """Leave out the shapes of inner values that no longer hold."""
    kept = [port for port in graph.value_info if port.name not in stale and not after.has_changed(port.name)]
    del graph.value_info[:]
    graph.value_info.extend(kept)
