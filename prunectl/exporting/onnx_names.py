"""Canonical names and order of an ONNX graph: they depend on the source, not on the converter."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from prunectl.formats.base import Array, ModelFile
from prunectl.formats.safe_json import require
from prunectl.onnx_graph import (
    all_graphs,
    copy_message,
    inner_graphs,
    names_defined,
    names_read,
)

BATCH = "batch"
_FOLDED_BIAS = "_bias"
"""Suffix that PyTorch's exporter gives the bias of a layer that had none before batch-norm folding."""
_CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
_NUMBERED_NAME = "onnx::"
_ORDERS: tuple[tuple[int, ...], ...] = ((1, 0), (3, 2, 0, 1), (2, 1, 0), (4, 3, 0, 1, 2), (2, 3, 0, 1))
"""Axis orders into which converters transpose kernels."""


def canonical_names(
    proto: Any,
    file: ModelFile,
    inputs: Sequence[str],
    outputs: Sequence[str],
    parameters: Mapping[str, str] | None = None,
) -> None:
    """Name weights as the source does, inputs and outputs as specified, and everything else by its operator.

    Weights are matched by fingerprint. Those that a converter changed, as by folding a batch normalisation into a
    convolution, are matched by `parameters`, which maps names that the converter kept to names in the file.
    """
    graph = proto.graph
    known_names, parameter_names = known_weights(file), _parameter_names(graph, parameters or {})
    to_array = require("onnx.numpy_helper", extra="onnx").to_array

    def weight(initializer: Any) -> str:
        return known_names.get(fingerprint(to_array(initializer))) or parameter_names.get(initializer.name, "constant")

    canonical_order(graph)
    names = {port.name: name for port, name in zip(graph.input, inputs, strict=True)}
    for port, name in zip(graph.output, outputs, strict=True):
        if port.name in names:
            # The output is also an input or another output: an Identity node gives it a name of its own.
            port.name = _add_identity(graph, port.name, name)
        names[port.name] = name
    _rename_values(graph, names, _UnusedNames([*inputs, *outputs]), weight)
    graph.name = file.path.stem
    _name_axes(graph)


def known_weights(file: ModelFile) -> dict[str, str]:
    """Weight names by fingerprint, for every axis order; ambiguous fingerprints are left out."""
    names: dict[str, str] = {}
    duplicates: set[str] = set()
    for tensor in file.tensors:
        if tensor.size < 2 or tensor.name in file.duplicates or not tensor.is_float:
            continue
        array = file.read(tensor)
        orders = [order for order in _ORDERS if len(order) == array.ndim]
        for digest in {fingerprint(array), *(fingerprint(array.transpose(order)) for order in orders)}:
            if digest in names:
                duplicates.add(digest)
            names[digest] = tensor.name
    return {digest: name for digest, name in names.items() if digest not in duplicates}


def fingerprint(array: Array) -> str:
    """SHA-256 of an array's bytes, shape and dtype."""
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes())
    digest.update(repr((array.shape, array.dtype.name)).encode())
    return digest.hexdigest()


def _parameter_names(graph: Any, parameters: Mapping[str, str]) -> dict[str, str]:
    """Canonical names for initializers that the converter named after parameters."""
    names: dict[str, str] = {}
    for initializer in (each for inner in all_graphs(graph) for each in inner.initializer):
        # Folding a batch normalisation gives a bias to a convolution that had none.
        weight = initializer.name.removesuffix(_FOLDED_BIAS)
        if initializer.name in parameters:
            names[initializer.name] = parameters[initializer.name]
        elif initializer.name.endswith(_FOLDED_BIAS) and weight in parameters:
            names[initializer.name] = f"{parameters[weight].removesuffix('weight')}bias"
    for node in graph.node:
        # The older exporter names nodes after their modules, but numbers the weights that it has folded.
        scope = ".".join(node.name.strip("/").split("/")[:-1])
        for name, leaf in zip(node.input[1:], ("weight", "bias"), strict=False):
            parameter = parameters.get(f"{scope}.weight") if node.op_type in _CONVOLUTIONS else None
            if parameter is not None and name.startswith(_NUMBERED_NAME) and name not in names:
                names[name] = parameter if leaf == "weight" else f"{parameter.removesuffix('weight')}bias"
    return names


def _add_identity(graph: Any, old: str, name: str) -> str:
    helper = require("onnx.helper", extra="onnx")
    node_output = f"{old}/{name}"
    graph.node.append(helper.make_node("Identity", [old], [node_output]))
    return node_output


def _rename_values(graph: Any, outer: Mapping[str, str], unused: _UnusedNames, weight: Callable[[Any], str]) -> None:
    names = dict(outer)
    for initializer in graph.initializer:
        if initializer.name not in names:
            names[initializer.name] = unused.free(weight(initializer))
    for port in graph.input:
        if port.name not in names:
            names[port.name] = unused.free("inner")
    for node in graph.node:
        kind = node.op_type.lower()
        for value in node.output:
            if value and value not in names:
                names[value] = unused.free(kind)
        node.name = unused.free(f"{kind}_node")
        for _, inner in inner_graphs(node):
            # A name defined in a subgraph hides the same name of the outer graph.
            hidden = names_defined(inner)
            _rename_values(inner, {old: new for old, new in names.items() if old not in hidden}, unused, weight)
            inner.name = unused.free("body")
    _apply_names(graph, names)
    del graph.value_info[:]


class _UnusedNames:
    """Names that are not taken yet."""

    def __init__(self, taken: Sequence[str]) -> None:
        self._taken = set(taken)
        self._counts: Counter[str] = Counter()

    def free(self, name: str) -> str:
        """The name itself, or with the first free number appended."""
        unused = name
        while unused in self._taken:
            self._counts[name] += 1
            unused = f"{name}_{self._counts[name]}"
        self._taken.add(unused)
        return unused


def _apply_names(graph: Any, names: Mapping[str, str]) -> None:
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        for field in (node.input, node.output):
            for index, name in enumerate(field):
                field[index] = names.get(name, name)


def _name_axes(graph: Any) -> None:
    """Name the symbolic batch axis `batch`, and other axes after the first port that has them, not by a counter."""
    names: dict[str, str] = {}
    for port in (*graph.input, *graph.output):
        for index, axis in enumerate(port.type.tensor_type.shape.dim):
            if axis.dim_param:
                axis.dim_param = names.setdefault(axis.dim_param, BATCH if index == 0 else f"{port.name}_{index}")


def canonical_order(graph: Any) -> None:
    """Topological sort, depth-first from the first output on; unused nodes and initializers are removed."""
    for node in graph.node:
        for _, inner in inner_graphs(node):
            canonical_order(inner)
    nodes = [copy_message(node) for node in graph.node]
    producers = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    ordered = _topological_order(nodes, producers, [port.name for port in graph.output])
    del graph.node[:]
    graph.node.extend(nodes[index] for index in ordered)
    used = dict.fromkeys(name for node in graph.node for name in names_read(node))
    used |= dict.fromkeys(port.name for port in graph.output)
    initializers = {initializer.name: copy_message(initializer) for initializer in graph.initializer}
    del graph.initializer[:]
    graph.initializer.extend(initializers[name] for name in used if name in initializers)


def _topological_order(nodes: list[Any], producers: dict[str, int], wanted: Iterable[str]) -> list[int]:
    ordered: dict[int, None] = {}
    visited: set[int] = set()
    pending = [producers[name] for name in reversed(list(wanted)) if name in producers]
    while pending:
        index = pending[-1]
        if index in ordered:
            pending.pop()
            continue
        missing = [
            producers[name] for name in names_read(nodes[index]) if name in producers and producers[name] not in ordered
        ]
        if not missing or index in visited:
            ordered[index] = None
            pending.pop()
            continue
        visited.add(index)
        pending.extend(reversed(missing))
    return list(ordered)
