"""How much does a .tflite model multiply? Its operators with weights, counted per inference."""

from __future__ import annotations

import math

from prunectl.formats import budgets
from prunectl.formats.base import ModelFile, Operation
from prunectl.formats.tflite.model import constants
from prunectl.formats.tflite.schema import LiteGraph, LiteOperator, read_lite
from prunectl.formats.tflite.usage import layer_of

_SHAPE_OPERATORS = frozenset({"DEQUANTIZE", "DENSIFY"})


def operations(model: ModelFile) -> tuple[Operation, ...]:
    """The multiply-accumulate operations of a model, for the shapes in the file; a free size counts as 1."""
    lite = read_lite(model.path)
    names = {place: tensor.name for place, (tensor, _) in constants(lite)}
    operations = []
    for number, graph in enumerate(lite.graphs):
        makers = {at: operator for operator in graph.operators for at in operator.outputs}
        for operator in graph.operators:
            if operator.kind not in _MULTIPLYING or not _is_whole(operator):
                continue
            weight = _origin(operator.inputs[1], makers)
            operations.append(
                Operation(
                    layer=layer_of(graph, operator, operator.outputs[0]),
                    kind=operator.kind,
                    macs=_count(graph, operator),
                    weight=names.get((number, weight), ""),
                )
            )
    return tuple(operations)


def _is_whole(operator: LiteOperator) -> bool:
    needed = 3 if operator.kind == "TRANSPOSE_CONV" else 2
    return (
        len(operator.inputs) >= needed
        and bool(operator.outputs)
        and min(*operator.inputs[:needed], operator.outputs[0]) >= 0
    )


def _origin(at: int, makers: dict[int, LiteOperator]) -> int:
    """The tensor that is stored, behind what turns it into what is used."""
    for _ in range(budgets.MAX_PASSED_OPERATORS):
        maker = makers.get(at)
        if maker is None or maker.kind not in _SHAPE_OPERATORS or not maker.inputs:
            break
        at = maker.inputs[0]
    return at


def _count(graph: LiteGraph, operator: LiteOperator) -> int:
    """Elements of the output, each a sum over the axes of one input: those of the weight that the output has not."""
    inputs = [tuple(max(size, 1) for size in graph.tensors[at].shape) if at >= 0 else () for at in operator.inputs]
    output = tuple(max(size, 1) for size in graph.tensors[operator.outputs[0]].shape)
    if operator.kind == "BATCH_MATMUL":
        is_turned = operator.options is not None and operator.options.number(0, 1) != 0
        return math.prod(output) * math.prod(inputs[0][-2:-1] if is_turned else inputs[0][-1:])
    if operator.kind == "TRANSPOSE_CONV":
        output = inputs[2]
    return math.prod(output) * math.prod(inputs[1][_SUMMED[operator.kind]])


_SUMMED = {
    "CONV_2D": slice(1, None),  # [out, height, width, in]
    "DEPTHWISE_CONV_2D": slice(1, 3),  # [1, height, width, channels]
    "FULLY_CONNECTED": slice(-1, None),  # [out, in]
    "TRANSPOSE_CONV": slice(None, -1),  # [out, height, width, in]
    "CONV_3D": slice(None, -1),  # [depth, height, width, in, out]
}
"""The axes of the weight that are summed over: for a transposed convolution those of each element of its input."""
_MULTIPLYING = frozenset({*_SUMMED, "BATCH_MATMUL"})
