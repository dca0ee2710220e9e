"""Names in an ONNX graph that do not depend on how often something was converted before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from prunectl.exporting.onnx_order import inner_graphs, order
from prunectl.exporting.onnx_weights import known_weights, mark
from prunectl.formats.base import ModelFile
from prunectl.formats.optional import require

BATCH = "batch"


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


def rename(proto: Any, file: ModelFile, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Name weights as the source does, inputs and outputs as said, and everything else by what makes it."""
    graph = proto.graph
    order(graph)
    names = {port.name: name for port, name in zip(graph.input, inputs, strict=True)}
    for port, name in zip(graph.output, outputs, strict=True):
        if port.name in names:
            # An output is also an input, or another output: it is handed on under a name of its own.
            port.name = _handed_on(graph, port.name, name)
        names[port.name] = name
    _rename(graph, names, _Names([*inputs, *outputs]), known_weights(file))
    graph.name = file.path.stem
    _name_axes(graph)


def _handed_on(graph: Any, old: str, name: str) -> str:
    helper = require("onnx.helper", extra="onnx")
    own = f"{old}/{name}"
    graph.node.append(helper.make_node("Identity", [old], [own]))
    return own


def _rename(graph: Any, outer: Mapping[str, str], fresh: _Names, known: Mapping[str, str]) -> None:
    names = dict(outer)
    helper = require("onnx.numpy_helper", extra="onnx")
    for one in graph.initializer:
        if one.name not in names:
            names[one.name] = fresh.free(known.get(mark(helper.to_array(one)), "constant"))
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
            _rename(inner, {old: new for old, new in names.items() if old not in own}, fresh, known)
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
