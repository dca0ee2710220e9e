"""What ONNX tensors are for, as the nodes that use them tell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prunectl.formats.base import Role
from prunectl.formats.onnx.proto import Node

OutAxis = Callable[[Node, int], int | None]
"""From a node and the rank of its weight to the axis of the output channels."""


@dataclass(frozen=True, slots=True)
class Part:
    """What an operation takes at one of its inputs."""

    role: Role
    out_axis: OutAxis = lambda _node, _rank: None


def _axis(number: int) -> OutAxis:
    return lambda _node, rank: number if number < rank else None


def _last(_node: Node, rank: int) -> int | None:
    return rank - 1 if rank > 1 else None


def _second_last(_node: Node, rank: int) -> int | None:
    return rank - 2 if rank > 1 else None


def _fused(node: Node, rank: int) -> int | None:
    return _second_last(node, rank) if node.number("transB", 0) else _last(node, rank)


def _gemm(switch: str, plain: int) -> OutAxis:
    return lambda node, _rank: 1 - plain if node.number(switch, 0) else plain


_BIAS, _NORM, _STATE = Part(Role.BIAS), Part(Role.NORM), Part(Role.STATE)
_FIRST, _SECOND = Part(Role.KERNEL, _axis(0)), Part(Role.KERNEL, _axis(1))
_COLUMNS, _ROWS = Part(Role.KERNEL, _last), Part(Role.KERNEL, _second_last)
_GEMM = {0: Part(Role.KERNEL, _gemm("transA", 0)), 1: Part(Role.KERNEL, _gemm("transB", 1)), 2: _BIAS}
_CELL = {1: _SECOND, 2: Part(Role.RECURRENT, _axis(1)), 3: _BIAS, 5: _STATE, 6: _STATE}
_SCALE = {1: _NORM, 2: _NORM}

PARTS: dict[str, dict[int, Part]] = {
    "Conv": {1: _FIRST, 2: _BIAS},
    "FusedConv": {1: _FIRST, 2: _BIAS},
    "ConvInteger": {1: _FIRST},
    "QLinearConv": {3: _FIRST, 8: _BIAS},
    "DeformConv": {1: _FIRST, 3: _BIAS},
    "ConvTranspose": {1: _SECOND, 2: _BIAS},
    "Gemm": _GEMM,
    "FusedGemm": _GEMM,
    "QGemm": {3: Part(Role.KERNEL, _gemm("transB", 1)), 6: _BIAS},
    "MatMul": {0: _ROWS, 1: _COLUMNS},
    "FusedMatMul": {1: Part(Role.KERNEL, _fused)},
    "MatMulInteger": {0: _ROWS, 1: _COLUMNS},
    "MatMulIntegerToFloat": {0: _ROWS, 1: _COLUMNS, 6: _BIAS},
    "DynamicQuantizeMatMul": {1: _COLUMNS, 4: _BIAS},
    "QLinearMatMul": {0: _ROWS, 3: _COLUMNS},
    "MatMulNBits": {1: _FIRST, 5: _BIAS},
    "Attention": {1: _COLUMNS, 2: _BIAS},
    "QAttention": {1: _COLUMNS, 2: _BIAS},
    "Einsum": {0: Part(Role.KERNEL), 1: Part(Role.KERNEL)},
    "LSTM": _CELL,
    "GRU": _CELL,
    "RNN": _CELL,
    "BatchNormalization": {**_SCALE, 3: _STATE, 4: _STATE},
    "InstanceNormalization": _SCALE,
    "LayerNormalization": _SCALE,
    "GroupNormalization": _SCALE,
    "RMSNormalization": _SCALE,
    "SimplifiedLayerNormalization": _SCALE,
    "SkipLayerNormalization": {2: _NORM, 3: _NORM, 4: _BIAS},
    "SkipSimplifiedLayerNormalization": {2: _NORM, 3: _BIAS},
    "Gather": {0: Part(Role.EMBEDDING)},
}
"""By operation and number of the input."""

PASSING = frozenset(
    {"DequantizeLinear", "QuantizeLinear", "Transpose", "Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze"}
    | {"Quant", "IntQuant", "BipolarQuant", "FloatQuant", "FakeQuant"}
)
"""Operations that hand their first input on: a weight stays a weight behind them."""
SPLICING = frozenset({"Slice", "Concat"})
"""Operations that reorder the gates of a recurrent layer on the way to it."""
CELLS = frozenset({"LSTM", "GRU", "RNN"})
_RESHAPING = frozenset({"Reshape", "Squeeze", "Unsqueeze"})

CALCULATING = frozenset(
    operation for operation, parts in PARTS.items() if any(part.role is Role.KERNEL for part in parts.values())
)


def axis_before(node: Node, axis: int | None, rank: int, order: tuple[int, ...]) -> int | None:
    """Return the axis that a passing operation turns into ``axis``."""
    if axis is None or node.op in _RESHAPING:
        return None
    if node.op != "Transpose":
        return axis
    order = order or tuple(reversed(range(rank)))
    return order[axis] if axis < len(order) and 0 <= order[axis] < rank else None
