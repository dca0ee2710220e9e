"""The nodes of an ONNX graph in an order that follows from what they make alone."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from prunectl.formats.base import Array, ModelFile
from prunectl.formats.safe_json import require


def order(graph: Any) -> None:
    """Put nodes after what they need, those for the first output first, and leave out what nothing needs."""
    for node in graph.node:
        for inner in inner_graphs(node):
            order(inner)
    nodes = [_copy(node) for node in graph.node]
    makers = {name: at for at, node in enumerate(nodes) for name in node.output if name}
    ordered = _ordered(nodes, makers, [port.name for port in graph.output])
    del graph.node[:]
    graph.node.extend(nodes[at] for at in ordered)
    used = dict.fromkeys(name for node in graph.node for name in values_read(node))
    used |= dict.fromkeys(port.name for port in graph.output)
    held = {one.name: _copy(one) for one in graph.initializer}
    del graph.initializer[:]
    graph.initializer.extend(held[name] for name in used if name in held)


def inner_graphs(node: Any) -> Iterator[Any]:
    """Yield the graphs inside a node, such as the body of a loop."""
    for attribute in node.attribute:
        for inner in (attribute.g, *attribute.graphs):
            if inner.node or inner.output:
                yield inner


def values_read(node: Any) -> Iterator[str]:
    """Yield what a node takes, also what the graphs inside it take from around them."""
    yield from filter(None, node.input)
    for inner in inner_graphs(node):
        own = {one.name for one in (*inner.input, *inner.initializer)}
        own |= {name for one in inner.node for name in one.output}
        yield from (name for one in inner.node for name in values_read(one) if name not in own)
        yield from (port.name for port in inner.output if port.name not in own)


def _ordered(nodes: list[Any], makers: dict[str, int], wanted: Iterable[str]) -> list[int]:
    found: dict[int, None] = {}
    entered: set[int] = set()
    pending = [makers[name] for name in reversed(list(wanted)) if name in makers]
    while pending:
        at = pending[-1]
        if at in found:
            pending.pop()
            continue
        missing = [makers[name] for name in values_read(nodes[at]) if name in makers and makers[name] not in found]
        if not missing or at in entered:
            found[at] = None
            pending.pop()
            continue
        entered.add(at)
        pending.extend(reversed(missing))
    return list(found)


def _copy(message: Any) -> Any:
    found = type(message)()
    found.CopyFrom(message)
    return found


def opset_of(proto: Any) -> int | None:
    """Return the version that a model is of."""
    return next((one.version for one in proto.opset_import if one.domain in {"", "ai.onnx"}), None)


_ORDERS: tuple[tuple[int, ...], ...] = ((1, 0), (3, 2, 0, 1), (2, 1, 0), (4, 3, 0, 1, 2), (2, 3, 0, 1))
"""How converters turn kernels around."""


def known_weights(file: ModelFile) -> dict[str, str]:
    """Return the names of weights by their marks, in every order of axes; nothing of numbers that are there twice."""
    found: dict[str, str] = {}
    doubled: set[str] = set()
    for tensor in file.tensors:
        if tensor.size < 2 or tensor.name in file.copies or not tensor.is_float:
            continue
        array = file.read(tensor)
        orders = [order for order in _ORDERS if len(order) == array.ndim]
        for one in {fingerprint(array), *(fingerprint(array.transpose(order)) for order in orders)}:
            if one in found:
                doubled.add(one)
            found[one] = tensor.name
    return {one: name for one, name in found.items() if one not in doubled}


def fingerprint(array: Array) -> str:
    """Return what stands for the numbers of an array, its shape and its type."""
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes())
    digest.update(repr((array.shape, array.dtype.name)).encode())
    return digest.hexdigest()


BATCH = "batch"
_FOLDED = "_bias"
"""What the exporter of PyTorch puts behind the name of a weight whose layer had no bias."""
_LAYERS = frozenset({"Conv", "ConvTranspose"})
_NUMBERED = "onnx::"


class _Names:
    """New names, each given once."""

    def __init__(self, taken: Sequence[str]) -> None:
        self._taken = set(taken)
        self._counts: Counter[str] = Counter()

    def free(self, name: str) -> str:
        """Return a name, with a number behind it if it is taken."""
        found = name
        while found in self._taken:
            self._counts[name] += 1
            found = f"{name}_{self._counts[name]}"
        self._taken.add(found)
        return found


def canonical_names(
    proto: Any,
    file: ModelFile,
    inputs: Sequence[str],
    outputs: Sequence[str],
    parameters: Mapping[str, str] | None = None,
) -> None:
    """Name weights as the source does, inputs and outputs as said, and everything else by what makes it.

    Weights are told by their numbers; where a converter has changed them, as it folds a batch normalisation into a
    convolution, by the names of parameters that it kept, given with what the file calls them.
    """
    graph = proto.graph
    known, kept = known_weights(file), _kept(graph, parameters or {})
    to_array = require("onnx.numpy_helper", extra="onnx").to_array

    def weight(one: Any) -> str:
        return known.get(fingerprint(to_array(one))) or kept.get(one.name, "constant")

    order(graph)
    names = {port.name: name for port, name in zip(graph.input, inputs, strict=True)}
    for port, name in zip(graph.output, outputs, strict=True):
        if port.name in names:
            # An output is also an input, or another output: it is handed on under a name of its own.
            port.name = _handed_on(graph, port.name, name)
        names[port.name] = name
    _rename(graph, names, _Names([*inputs, *outputs]), weight)
    graph.name = file.path.stem
    _name_axes(graph)


def _kept(graph: Any, parameters: Mapping[str, str]) -> dict[str, str]:
    """Return what initializers are called whose names are those of parameters, or begin so."""
    found: dict[str, str] = {}
    for one in _initializers(graph):
        # What a convolution without a bias gets from the normalisation behind it is its bias now.
        weight = one.name.removesuffix(_FOLDED)
        if one.name in parameters:
            found[one.name] = parameters[one.name]
        elif one.name.endswith(_FOLDED) and weight in parameters:
            found[one.name] = f"{parameters[weight].removesuffix('weight')}bias"
    for node in graph.node:
        # The older exporter names nodes after their modules, and what it has folded by numbers.
        scope = ".".join(node.name.strip("/").split("/")[:-1])
        for name, leaf in zip(node.input[1:], ("weight", "bias"), strict=False):
            own = parameters.get(f"{scope}.weight") if node.op_type in _LAYERS else None
            if own is not None and name.startswith(_NUMBERED) and name not in found:
                found[name] = own if leaf == "weight" else f"{own.removesuffix('weight')}bias"
    return found


def _initializers(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for node in graph.node:
        for inner in inner_graphs(node):
            yield from _initializers(inner)


def _handed_on(graph: Any, old: str, name: str) -> str:
    helper = require("onnx.helper", extra="onnx")
    own = f"{old}/{name}"
    graph.node.append(helper.make_node("Identity", [old], [own]))
    return own


def _rename(graph: Any, outer: Mapping[str, str], fresh: _Names, weight: Callable[[Any], str]) -> None:
    names = dict(outer)
    for one in graph.initializer:
        if one.name not in names:
            names[one.name] = fresh.free(weight(one))
    for port in graph.input:
        if port.name not in names:
            names[port.name] = fresh.free("inner")
    for node in graph.node:
        kind = node.op_type.lower()
        for value in node.output:
            if value and value not in names:
                names[value] = fresh.free(kind)
        node.name = fresh.free(f"{kind}_node")
        for inner in inner_graphs(node):
            # A name inside may be that of a value around it, which it hides.
            own = {one.name for one in (*inner.input, *inner.initializer)}
            own |= {value for one in inner.node for value in one.output}
            _rename(inner, {old: new for old, new in names.items() if old not in own}, fresh, weight)
            inner.name = fresh.free("body")
    _apply(graph, names)
    del graph.value_info[:]


def _apply(graph: Any, names: Mapping[str, str]) -> None:
    for one in (*graph.input, *graph.output, *graph.initializer):
        one.name = names.get(one.name, one.name)
    for node in graph.node:
        for field in (node.input, node.output):
            for at, name in enumerate(field):
                field[at] = names.get(name, name)


def _name_axes(graph: Any) -> None:
    """Call the axis of the examples what it is, and others by the first port that has them, not by a counter."""
    names: dict[str, str] = {}
    for port in (*graph.input, *graph.output):
        for at, axis in enumerate(port.type.tensor_type.shape.dim):
            if axis.dim_param:
                axis.dim_param = names.setdefault(axis.dim_param, BATCH if at == 0 else f"{port.name}_{at}")
