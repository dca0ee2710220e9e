"""How operations of ONNX turn shapes into shapes, for the usual ones of them."""

from __future__ import annotations

from collections.abc import Callable

from prunectl.formats.onnx import rearranged
from prunectl.formats.onnx.step import Shape, Step, UnknownShapeError, broadcast, wrapped
from prunectl.formats.onnx.windows import convolved, deconvolved, pooled, pooled_whole

Rule = Callable[[Step], Shape]
"""From an operation to the shape of its first output."""


def _same(step: Step) -> Shape:
    return step.shape(0)


def _joined(step: Step) -> Shape:
    return broadcast(*(step.shape(place) for place in range(len(step.inputs))))


def matmul(left: Shape, right: Shape) -> Shape:
    """Return the shape of a product of matrices."""
    if not left or not right:
        raise UnknownShapeError
    rows, columns = left[-2:-1], right[-1:] if len(right) > 1 else ()
    return (*broadcast(left[:-2], right[:-2]), *rows, *columns)


def _gemm(step: Step) -> Shape:
    left, right = step.shape(0), step.shape(1)
    if len(left) != 2 or len(right) != 2:
        raise UnknownShapeError
    return left[1 if step.node.number("transA", 0) else 0], right[0 if step.node.number("transB", 0) else 1]


def _reduced(step: Step) -> Shape:
    shape = step.shape(0)
    axes = step.setting("axes", 1, tuple(range(len(shape)))) or tuple(range(len(shape)))
    gone = {wrapped(axis, len(shape)) for axis in axes}
    if step.node.number("keepdims", 1):
        return tuple(1 if axis in gone else length for axis, length in enumerate(shape))
    return tuple(length for axis, length in enumerate(shape) if axis not in gone)


def _recurrent(step: Step) -> Shape:
    length, batch, _ = step.shape(0)
    directions, units = step.shape(2)[0], step.shape(2)[-1]
    if step.node.number("layout", 0):
        raise UnknownShapeError
    return length, directions, batch, units


def _named(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, Rule] = {
    **_named(_same, "Relu Sigmoid Tanh LeakyRelu Clip Elu Selu Celu Softmax LogSoftmax Hardmax Identity Cast CastLike"),
    **_named(_same, "Dropout BatchNormalization InstanceNormalization LayerNormalization GroupNormalization"),
    **_named(_same, "RMSNormalization SimplifiedLayerNormalization SkipLayerNormalization LpNormalization LRN"),
    **_named(
        _same, "MeanVarianceNormalization HardSwish HardSigmoid Gelu FastGelu BiasGelu QuickGelu Erf Exp Log Sqrt"
    ),
    **_named(_same, "Neg Abs Floor Ceil Round Softplus Softsign Reciprocal Sign Mish Swish ThresholdedRelu Shrink Not"),
    **_named(_same, "QuantizeLinear DequantizeLinear DynamicQuantizeLinear Quant IntQuant FloatQuant BipolarQuant"),
    **_named(_same, "CumSum IsNaN IsInf Trilu ScatterND ScatterElements Sin Cos PRelu Bernoulli"),
    **_named(_joined, "Add Sub Mul Div Pow Max Min Sum Mean Where Equal Greater GreaterOrEqual Less LessOrEqual"),
    **_named(_joined, "And Or Xor Mod"),
    **_named(_reduced, "ReduceMean ReduceSum ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceLogSumExp"),
    **_named(pooled, "MaxPool AveragePool LpPool"),
    **_named(pooled_whole, "GlobalAveragePool GlobalMaxPool GlobalLpPool"),
    **_named(convolved, "Conv FusedConv ConvInteger"),
    **_named(lambda step: convolved(step, 3), "QLinearConv"),
    **_named(lambda step: matmul(step.shape(0), step.shape(1)), "MatMul MatMulInteger"),
    **_named(lambda step: matmul(step.shape(0), step.shape(3)), "QLinearMatMul"),
    **_named(_gemm, "Gemm FusedGemm"),
    **_named(_recurrent, "LSTM GRU RNN"),
    **_named(lambda step: (len(step.shape(0)),), "Shape"),
    **_named(lambda step: step.numbers(0), "ConstantOfShape"),
    "ConvTranspose": deconvolved,
    "Concat": rearranged.concatenated,
    "DepthToSpace": rearranged.depth_to_space,
    "Expand": rearranged.expanded,
    "Flatten": rearranged.flattened,
    "Gather": rearranged.gathered,
    "Pad": rearranged.padded,
    "Resize": rearranged.resized,
    "Upsample": rearranged.resized,
    "Reshape": rearranged.reshaped,
    "Slice": rearranged.sliced,
    "SpaceToDepth": rearranged.space_to_depth,
    "Squeeze": rearranged.squeezed,
    "Tile": rearranged.tiled,
    "Transpose": rearranged.transposed,
    "Unsqueeze": rearranged.unsqueezed,
}
