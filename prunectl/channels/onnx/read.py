"""From an ONNX file to a graph that can be followed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from prunectl.channels.graph import Graph, Kind, Node
from prunectl.channels.lengths import NOTHING, Lengths
from prunectl.channels.onnx import views as seen_as
from prunectl.channels.onnx.kinds import Seen, facts
from prunectl.channels.onnx.shapes import STANDARD, Known, known
from prunectl.channels.onnx.shared import untie
from prunectl.errors import InputError, first_line
from prunectl.formats.base import ModelFile
from prunectl.formats.optional import require


@dataclass(frozen=True, slots=True)
class Opened:
    """An ONNX model in memory, and what was read from it."""

    proto: Any
    graph: Graph
    known: Known
    locations: dict[str, str]
    """Files beside the model that tensors lie in, by tensor."""
    copies: dict[str, str]
    """What each copy of a shared weight is a copy of."""


def opened(model: ModelFile, lengths: Lengths = NOTHING) -> Opened:
    """Read an ONNX model; its handler has checked where its numbers lie."""
    onnx = require("onnx", extra="onnx")
    try:
        proto = onnx.load(model.path, load_external_data=False)
        locations = {
            tensor.name: entry.value
            for tensor in proto.graph.initializer
            for entry in tensor.external_data
            if entry.key == "location"
        }
        if locations:
            onnx.load_external_data_for_model(proto, str(model.path.parent))
    except Exception as error:
        line = first_line(error)
        raise InputError(f"{model.path} cannot be read by onnx: {line}") from error
    _fill(proto, model)
    copies = untie(proto)
    locations |= {copy: locations[name] for copy, name in copies.items() if name in locations}
    found = known(proto, str(model.path), lengths)
    return Opened(proto, graph_of(proto, found), found, locations, copies)


def _fill(proto: Any, model: ModelFile) -> None:
    """Put back the zeros of tensors that are stored without."""
    from_array = require("onnx.numpy_helper", extra="onnx").from_array
    tensors = {tensor.name: tensor for tensor in model.tensors}
    for sparse in proto.graph.sparse_initializer:
        name = sparse.values.name
        proto.graph.initializer.append(from_array(np.ascontiguousarray(model.read(tensors[name])), name))
    del proto.graph.sparse_initializer[:]


def graph_of(proto: Any, found: Known) -> Graph:
    """Return the main graph, its operations by what they do to channels."""
    graph = proto.graph
    weights = seen_as.weights(graph)
    shapes = {**found.shapes, **{name: array.shape for name, array in weights.items()}}
    views = seen_as.views(graph, weights, shapes)
    given = {tensor.name for tensor in graph.initializer}
    opset = next((entry.version for entry in proto.opset_import if entry.domain in STANDARD), 1)
    nodes = []
    for number, node in enumerate(graph.node):
        if all(name in views or name in found.constants for name in node.output if name):
            continue
        nodes.append(_node(node, number, Seen(node, Known(shapes, found.constants), views, opset)))
    return Graph(
        nodes=tuple(nodes),
        weights=weights,
        views=views,
        uses=seen_as.uses(graph, views),
        shapes=shapes,
        inputs=tuple(port.name for port in graph.input if port.name not in given),
        outputs=tuple(port.name for port in graph.output),
    )


def _node(node: Any, number: int, seen: Seen) -> Node:
    name = node.name or f"#{number}"
    op = node.op_type if node.domain in STANDARD else f"{node.domain}.{node.op_type}"
    outputs = tuple(filter(None, node.output))
    if node.domain in STANDARD:
        kind, inputs, attributes = facts(seen)
    else:
        kind, inputs, attributes = Kind.UNKNOWN, (), {}
    if kind is Kind.UNKNOWN:
        inputs = tuple(filter(None, seen_as.read_by(node)))
    return Node(name, op, kind, inputs, outputs, attributes)
