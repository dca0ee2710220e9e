"""The role of each tensor of a .tflite graph, by the operator that uses it."""

from __future__ import annotations

from dataclasses import dataclass

from prunectl.formats import budgets
from prunectl.formats.base import Role
from prunectl.formats.tflite.schema import LiteGraph, LiteOperator

_PASSING = frozenset({"DEQUANTIZE", "DENSIFY", "CAST"})
"""Operators that decode a stored weight before another operator uses it."""
_WITH_WEIGHTS = ("Conv2D", "depthwise", "MatMul", "conv2d_transpose", "Conv3D", "Tensordot", "embedding_lookup")
"""How TensorFlow's names of operations with weights begin."""


@dataclass(frozen=True, slots=True)
class LiteTensorUse:
    """The role of one input of an operator."""

    role: Role
    out_axis: int | None = None
    in_axis: int | None = None


_KERNEL_FIRST = LiteTensorUse(Role.KERNEL, 0, 1)
_FILTER = LiteTensorUse(Role.KERNEL, 0, 3)
_BIAS = LiteTensorUse(Role.BIAS)
_RECURRENT = LiteTensorUse(Role.RECURRENT, 0, 1)
_LSTM = {
    **dict.fromkeys((1, 2, 3, 4, 16), _KERNEL_FIRST),
    **dict.fromkeys((5, 6, 7, 8), _RECURRENT),
    **dict.fromkeys((12, 13, 14, 15, 17), _BIAS),
    **dict.fromkeys((20, 21, 22, 23), LiteTensorUse(Role.NORM)),
}
_RNN = {1: _KERNEL_FIRST, 2: _RECURRENT, 3: _BIAS}

USES: dict[str, dict[int, LiteTensorUse]] = {
    "CONV_2D": {1: _FILTER, 2: _BIAS},
    "DEPTHWISE_CONV_2D": {1: LiteTensorUse(Role.KERNEL, 3, 0), 2: _BIAS},
    "FULLY_CONNECTED": {1: _KERNEL_FIRST, 2: _BIAS},
    "TRANSPOSE_CONV": {1: _FILTER, 3: _BIAS},
    "CONV_3D": {1: LiteTensorUse(Role.KERNEL, 4, 3), 2: _BIAS},
    "CONV_3D_TRANSPOSE": {1: LiteTensorUse(Role.KERNEL, 3, 4), 3: _BIAS},
    "EMBEDDING_LOOKUP": {1: LiteTensorUse(Role.EMBEDDING)},
    "EMBEDDING_LOOKUP_SPARSE": {3: LiteTensorUse(Role.EMBEDDING)},
    "LSTM": _LSTM,
    "UNIDIRECTIONAL_SEQUENCE_LSTM": _LSTM,
    "RNN": _RNN,
    "UNIDIRECTIONAL_SEQUENCE_RNN": _RNN,
    "SVDF": {1: _KERNEL_FIRST, 3: _BIAS},
}
"""Roles by operator and index of the input."""


@dataclass(frozen=True, slots=True)
class LiteTensorPurpose:
    """The role of a tensor, with the layer and the kind of operator that use it."""

    layer: str
    kind: str
    use: LiteTensorUse


def tensor_purposes(graph: LiteGraph) -> dict[int, LiteTensorPurpose]:
    """The purpose of each tensor that is an input of an operator, by the first operator that uses it."""
    users: dict[int, tuple[LiteOperator, int]] = {}
    for operator in graph.operators:
        for operand, index in enumerate(operator.inputs):
            users.setdefault(index, (operator, operand))
    return {index: _purpose(graph, index, users) for index in users if index >= 0}


def _purpose(graph: LiteGraph, index: int, users: dict[int, tuple[LiteOperator, int]]) -> LiteTensorPurpose:
    operator, operand = users[index]
    for _ in range(budgets.MAX_PASSED_OPERATORS):
        if operator.kind not in _PASSING or not operator.outputs or operator.outputs[0] not in users:
            break
        operator, operand = users[operator.outputs[0]]
    rank = len(graph.tensors[index].shape)
    use = _use(operator, operand, rank)
    has_axis = use.out_axis is None or use.out_axis < rank
    return LiteTensorPurpose(
        layer_of(graph, operator, index), operator.kind, use if has_axis else LiteTensorUse(Role.OTHER)
    )


def _use(operator: LiteOperator, operand: int, rank: int) -> LiteTensorUse:
    if operator.kind == "BATCH_MATMUL" and operand in {0, 1} and rank >= 2:
        adjoint = operator.options is not None and operator.options.number(operand, 1) != 0
        # The right input is [in, out], the left one [out, in], unless they are transposed.
        is_out_last = (operand == 1) != adjoint
        return (
            LiteTensorUse(Role.KERNEL, rank - 1, rank - 2)
            if is_out_last
            else LiteTensorUse(Role.KERNEL, rank - 2, rank - 1)
        )
    if operator.kind == "GATHER" and operand == 0 and rank == 2:
        return LiteTensorUse(Role.EMBEDDING)
    return USES.get(operator.kind, {}).get(operand, LiteTensorUse(Role.OTHER))


def layer_of(graph: LiteGraph, operator: LiteOperator, tensor: int) -> str:
    """The layer of an operator: the name scope of its weight, else of the given tensor, else of its output."""
    weights = [
        operand for operand, use in USES.get(operator.kind, {}).items() if use.role in {Role.KERNEL, Role.EMBEDDING}
    ]
    weight_tensors = [operator.inputs[operand] for operand in weights if operand < len(operator.inputs)]
    for index in (*weight_tensors, tensor, *operator.outputs):
        if index >= 0 and (scope := _scope(graph.tensors[index].name)):
            return scope
    return graph.tensors[operator.outputs[0] if operator.outputs and operator.outputs[0] >= 0 else tensor].name


def _scope(name: str) -> str:
    # The converter joins the names of fused operations with semicolons.
    parts = [part for part in name.split(";") if "/" in part]
    with_weights = [part for part in parts if part.rpartition("/")[2].startswith(_WITH_WEIGHTS)]
    first = next(iter(with_weights or parts), "").removeprefix("StatefulPartitionedCall/")
    return first.rpartition("/")[0]
