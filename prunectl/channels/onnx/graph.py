"""Reads an ONNX file, and translates its graph into a ChannelGraph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from prunectl.channels.graph import ChannelGraph, OpKind, OpNode, WeightView
from prunectl.channels.lengths import UNKNOWN_LENGTHS, AxisLengths
from prunectl.channels.onnx.ops import OnnxOpContext, lower
from prunectl.channels.onnx.shapes import StaticValues, infer_static
from prunectl.formats.base import Array, ModelFile
from prunectl.formats.safe_json import require
from prunectl.onnx_graph import (
    FLOAT_TYPES,
    STANDARD_DOMAINS,
    OnnxNetwork,
    axes_behind,
    densify,
    graph_tensors,
    load_network,
    names_captured,
    names_read,
    opset_of,
)


def _weights(network: OnnxNetwork) -> dict[str, Array]:
    """The arrays of all weights that may be pruned."""
    to_array = require("onnx.numpy_helper", extra="onnx").to_array
    return {
        tensor.name: network.outside[tensor.name]
        if tensor.name in network.outside
        else np.asarray(to_array(tensor.dense))
        for tensor in graph_tensors(network.proto.graph)
        if tensor.dense is not None and tensor.data_type in FLOAT_TYPES and len(tensor.dense.dims) >= 1
    }


def _weight_views(
    graph: Any, arrays: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, WeightView]:
    """The weights, and the views of them that operators such as Transpose, Squeeze and Cast make."""
    views = {name: WeightView(name, tuple(range(array.ndim))) for name, array in arrays.items()}
    for node in graph.node:
        if node.domain in STANDARD_DOMAINS and node.input and node.input[0] in views and node.output[0] in shapes:
            axes = _axes(node, views[node.input[0]].axes, shapes[node.input[0]], shapes[node.output[0]])
            if axes is not None:
                views[node.output[0]] = WeightView(views[node.input[0]].tensor, axes)
    return views


def _use_counts(graph: Any, views: Mapping[str, WeightView]) -> Counter[str]:
    """How many times nodes read each weight, except to make a view of it; a network output counts too."""
    counts: Counter[str] = Counter()
    for node in graph.node:
        if not (node.output and node.output[0] in views):
            counts.update(views[name].tensor for name in names_read(node) if name in views)
    counts.update(views[port.name].tensor for port in graph.output if port.name in views)
    return counts


def _axes(
    node: Any, axes: tuple[int | None, ...], before: tuple[int, ...], after: tuple[int, ...]
) -> tuple[int | None, ...] | None:
    if node.op_type not in {"Unsqueeze", "Squeeze"}:
        return axes_behind(node, axes)
    # Only axes of length 1 are added or removed: the others keep their order.
    longer = iter([axis for axis, length in zip(axes, before, strict=True) if length != 1])
    return tuple(None if length == 1 else next(longer) for length in after)


def unshare(proto: Any) -> dict[str, str]:
    """Give each further reader of a shared vector its own copy; return the originals by the names of the copies.

    Exporters merge equal initializers, such as the freshly initialized biases of unrelated layers.
    """
    graph = proto.graph
    vectors = {tensor.name: tensor for tensor in graph.initializer if _is_vector(tensor)}
    kept = {port.name for port in (*graph.input, *graph.output)}
    kept |= {name for node in graph.node for name in names_captured(node)}
    names = {name for node in graph.node for name in node.output} | {tensor.name for tensor in graph.initializer}
    used: set[str] = set()
    copies: dict[str, str] = {}
    for node in graph.node:
        for position, name in enumerate(node.input):
            if name not in vectors or name in kept:
                continue
            if name in used:
                duplicate = graph.initializer.add()
                duplicate.CopyFrom(vectors[name])
                duplicate.name = _unused(name, names)
                copies[duplicate.name] = name
                node.input[position] = duplicate.name
            used.add(name)
    return copies


def reshare(proto: Any, copies: dict[str, str]) -> None:
    """Undo `unshare` for copies that still equal their original."""
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    equal = {
        copy: name
        for copy, name in copies.items()
        if (tensors[copy].dims, tensors[copy].raw_data, tensors[copy].float_data, tensors[copy].double_data)
        == (tensors[name].dims, tensors[name].raw_data, tensors[name].float_data, tensors[name].double_data)
    }
    for node in proto.graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = equal.get(name, name)
    for name in equal:
        proto.graph.initializer.remove(tensors[name])


def _is_vector(tensor: Any) -> bool:
    return len(tensor.dims) == 1 and tensor.data_type in FLOAT_TYPES


def _unused(name: str, names: set[str]) -> str:
    number = 2
    while f"{name}_{number}" in names:
        number += 1
    names.add(f"{name}_{number}")
    return f"{name}_{number}"


@dataclass(frozen=True, slots=True)
class LoadedOnnx:
    """An ONNX model in memory, with its channel graph."""

    network: OnnxNetwork
    graph: ChannelGraph
    static: StaticValues
    locations: dict[str, str]
    """The file of external data that holds a tensor, by the name of the tensor."""
    copied_from: dict[str, str]
    """The original of each copy that `unshare` made."""


def load_onnx(model: ModelFile, lengths: AxisLengths = UNKNOWN_LENGTHS) -> LoadedOnnx:
    """Read an ONNX model; the handler of the format has already checked the locations of external data."""
    network, locations = load_network(model)
    densify(network.proto, model)
    copies = unshare(network.proto)
    locations |= {copy: locations[name] for copy, name in copies.items() if name in locations}
    static = infer_static(network.proto, str(model.path), lengths)
    return LoadedOnnx(network, _channel_graph(network, static), static, locations, copies)


def _channel_graph(network: OnnxNetwork, static: StaticValues) -> ChannelGraph:
    """The main graph as a ChannelGraph; nodes that only make views or constants are left out."""
    graph = network.proto.graph
    weights = _weights(network)
    shapes = {**static.shapes, **{name: array.shape for name, array in weights.items()}}
    views = _weight_views(graph, weights, shapes)
    initializers = {tensor.name for tensor in graph.initializer}
    opset = opset_of(network.proto) or 1
    nodes = []
    for number, node in enumerate(graph.node):
        if all(name in views or name in static.constants for name in node.output if name):
            continue
        nodes.append(_node(node, number, OnnxOpContext(node, StaticValues(shapes, static.constants), views, opset)))
    return ChannelGraph(
        nodes=tuple(nodes),
        weights=weights,
        views=views,
        uses=_use_counts(graph, views),
        shapes=shapes,
        inputs=tuple(port.name for port in graph.input if port.name not in initializers),
        outputs=tuple(port.name for port in graph.output),
    )


def _node(node: Any, number: int, context: OnnxOpContext) -> OpNode:
    name = node.name or f"#{number}"
    op = node.op_type if node.domain in STANDARD_DOMAINS else f"{node.domain}.{node.op_type}"
    outputs = tuple(filter(None, node.output))
    kind, inputs, attributes = lower(context)
    if kind is OpKind.UNKNOWN:
        inputs = tuple(names_read(node))
    return OpNode(name, op, kind, inputs, outputs, attributes)
