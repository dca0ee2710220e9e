"""ONNX weights as bfloat16, widened where they are used: few runtimes compute in it, and all of them can cast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prunectl.errors import UsageError
from prunectl.exporting.onnx_opset import opset_of
from prunectl.exporting.onnx_order import inner_graphs
from prunectl.exporting.request import Request
from prunectl.exporting.weights import narrowed
from prunectl.formats.optional import require

_FIRST_OPSET = 13
"""Since when Cast takes bfloat16."""
_WIDE = frozenset({"float32", "float64"})


def bfloat(proto: Any, request: Request) -> Any:
    """Return a model whose kernels are held in 16 bits; what has one axis stays as it is."""
    opset = opset_of(proto)
    if opset is not None and opset < _FIRST_OPSET:
        raise UsageError(
            f"--bf16 needs opset {_FIRST_OPSET} of ONNX, and the model is of {opset}", hint=f"--opset {_FIRST_OPSET}"
        )
    _narrow(proto.graph, request)
    return proto


def _narrow(graph: Any, request: Request) -> None:
    helper = require("onnx.helper", extra="onnx")
    numbers = require("onnx.numpy_helper", extra="onnx")
    fixed = {port.name for port in (*graph.input, *graph.output)}
    taken = {name for node in graph.node for name in (*node.input, *node.output)}
    names: dict[str, str] = {}
    nodes = []
    for one in graph.initializer:
        array = numbers.to_array(one)
        # Numbers of one axis may say a shape, which is inferred from what they are.
        if array.dtype.name in _WIDE and array.ndim > 1 and one.name not in fixed:
            names[one.name] = _free(f"{one.name}_wide", taken)
            cast = [one.name], [names[one.name]]
            nodes.append(helper.make_node("Cast", *cast, name=f"{names[one.name]}_node", to=one.data_type))
            one.CopyFrom(numbers.from_array(narrowed(request, one.name, array), one.name))
    for node in graph.node:
        for inner in inner_graphs(node):
            _narrow(inner, request)
    _redirect(graph, names)
    nodes += [_copy(node) for node in graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _redirect(graph: Any, names: Mapping[str, str]) -> None:
    """Let whatever reads a value read another one, inside of inner graphs as well."""
    for node in graph.node:
        for at, name in enumerate(node.input):
            node.input[at] = names.get(name, name)
        for inner in inner_graphs(node):
            own = {one.name for one in (*inner.input, *inner.initializer)}
            own |= {name for one in inner.node for name in one.output}
            _redirect(inner, {old: new for old, new in names.items() if old not in own})


def _copy(node: Any) -> Any:
    found = type(node)()
    found.CopyFrom(node)
    return found
