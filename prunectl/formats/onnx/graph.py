"""How much an ONNX model calculates: the multiply-accumulates of each operation, for one input."""

from __future__ import annotations

import math
from collections.abc import Iterator

from prunectl.formats.base import ModelFile, Operation
from prunectl.formats.onnx import messages, scopes
from prunectl.formats.onnx.infer import Shapes
from prunectl.formats.onnx.proto import Node
from prunectl.formats.onnx.roles import CALCULATING, CELLS, PASSING
from prunectl.formats.onnx.scopes import Scope
from prunectl.formats.onnx.step import Step, UnknownShapeError
from prunectl.formats.onnx.tensors import Locator
from prunectl.formats.onnx.uses import MAX_STEPS
from prunectl.formats.onnx.wire import reading

_WEIGHT_AT = {"QLinearConv": 3, "QLinearMatMul": 3, "QGemm": 3}
"""The input that is the weight, where it is not the second."""


def operations(model: ModelFile) -> tuple[Operation, ...]:
    """Return the operations that multiply, a batch counted as 1 when the file leaves it open.

    Those whose shapes the file does not tell, or that stand in branches, loops and functions, have no count.
    """
    with reading(model.path) as reader:
        main, *inner = scopes.read(reader, messages.model(reader))
        shapes = Shapes(reader, Locator(model.path), main.graph)
        counted = [found for node in _calculating(main) for found in _counted(node, main, shapes.step(node), shapes)]
    uncounted = [
        Operation(scope.prefix + node.label, node.op, None, _weight(node, scope))
        for scope in inner
        if not scope.is_training
        for node in _calculating(scope)
    ]
    return (*counted, *uncounted)


def _calculating(scope: Scope) -> Iterator[Node]:
    return (node for node in scope.graph.nodes if node.op in CALCULATING)


def _counted(node: Node, scope: Scope, step: Step, shapes: Shapes) -> Iterator[Operation]:
    if node.op in CELLS:
        for place in (1, 2):
            yield Operation(node.label, node.op, _cell(step, place), _weight(node, scope, place))
        return
    output = shapes.of(next(iter(node.outputs), ""))
    try:
        macs = _macs(step, output)
    except (UnknownShapeError, ValueError, IndexError):
        macs = None
    yield Operation(node.label, node.op, macs, _weight(node, scope))


def _macs(step: Step, output: tuple[int, ...] | None) -> int:
    op = step.node.op
    weight = step.shape(_WEIGHT_AT.get(op, 1))
    if op == "ConvTranspose":
        return math.prod(step.shape(0)) * math.prod(weight[1:])
    if output is None:
        raise UnknownShapeError
    if "Conv" in op:
        return math.prod(output) * math.prod(weight[1:])
    if "Gemm" in op:
        return math.prod(output) * weight[1 if step.node.number("transB", 0) else 0]
    if "MatMul" in op:
        return math.prod(output) * step.shape(0)[-1]
    raise UnknownShapeError


def _cell(step: Step, place: int) -> int | None:
    try:
        length, batch, _ = step.shape(0)
        return length * batch * math.prod(step.shape(place))
    except (UnknownShapeError, ValueError):
        return None


def _weight(node: Node, scope: Scope, place: int | None = None) -> str:
    """Return the tensor that an operation multiplies by, found behind what only hands it on."""
    places = (_WEIGHT_AT.get(node.op, 1), 0) if place is None else (place,)
    for at in places:
        name = node.inputs[at] if at < len(node.inputs) else ""
        here: Scope = scope
        for _ in range(MAX_STEPS + 1):
            owner = here.owner(name)
            if owner is None:
                break
            maker = owner.makers[name]
            if maker is None or maker.op == "Constant":
                return owner.prefix + name
            if maker.op not in PASSING or not maker.inputs:
                break
            here, name = owner, maker.inputs[0]
    return ""
