"""Shape inference rules for common ONNX operations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prunectl.formats.onnx.messages import NodeProto
from prunectl.formats.protobuf import signed

Shape = tuple[int, ...]


class UnknownOnnxShapeError(Exception):
    """The shape cannot be inferred, because it depends on unknown values, or is invalid."""


@dataclass(frozen=True, slots=True)
class OnnxStep:
    """One operation, with the known shapes and values of its inputs."""

    node: NodeProto
    inputs: Sequence[Shape | None]
    """Shapes of the inputs."""
    values: Sequence[Shape | None]
    """Contents of inputs that are short lists of known integers, such as shapes."""
    lists: Callable[[NodeProto, str], Shape | None]
    """Reads an attribute that is a list of integers."""

    def shape(self, operand: int) -> Shape:
        """The shape of an input."""
        return _known(self.inputs, operand)

    def numbers(self, operand: int) -> Shape:
        """The content of an input that is a list of known integers."""
        return _known(self.values, operand)

    def setting(self, name: str, operand: int, default: Shape | None = None) -> Shape:
        """A list of integers that is an attribute in old opsets, and an input in new ones."""
        attribute = self.lists(self.node, name)
        if attribute is not None:
            return attribute
        if operand >= len(self.node.inputs) or not self.node.inputs[operand]:
            if default is None:
                raise UnknownOnnxShapeError
            return default
        return self.numbers(operand)

    def axis(self, rank: int, default: int = 0) -> int:
        """The attribute `axis`; a negative one is wrapped."""
        return wrap_axis(signed(self.node.number("axis", default)), rank)


def _known(values: Sequence[Shape | None], operand: int) -> Shape:
    value = values[operand] if operand < len(values) else None
    if value is None:
        raise UnknownOnnxShapeError
    return value


def wrap_axis(axis: int, rank: int) -> int:
    """Wrap a negative axis."""
    if not -rank <= axis < rank:
        raise UnknownOnnxShapeError
    return axis % rank


def broadcast(*shapes: Shape) -> Shape:
    """The shape to which arrays of these shapes are broadcast."""
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    return tuple(next((length for length in lengths if length != 1), 1) for lengths in zip(*padded, strict=True))


def flattened(step: OnnxStep) -> Shape:
    """The output shape of Flatten: two axes."""
    shape = step.shape(0)
    axis = signed(step.node.number("axis", 1))
    axis = axis + len(shape) if axis < 0 else axis
    return math.prod(shape[:axis]), math.prod(shape[axis:])


def reshaped(step: OnnxStep) -> Shape:
    """The output shape of Reshape: 0 keeps a length, and -1 infers one."""
    old, target = step.shape(0), step.setting("shape", 1)
    if any(length == 0 and axis >= len(old) for axis, length in enumerate(target)):
        raise UnknownOnnxShapeError
    new = [old[axis] if length == 0 else length for axis, length in enumerate(target)]
    if -1 in new:
        known = math.prod(length for length in new if length != -1)
        if not known or math.prod(old) % known:
            raise UnknownOnnxShapeError
        new[new.index(-1)] = math.prod(old) // known
    return tuple(new)


def transposed(step: OnnxStep) -> Shape:
    """The output shape of Transpose."""
    shape = step.shape(0)
    order = step.lists(step.node, "perm") or tuple(reversed(range(len(shape))))
    if sorted(order) != list(range(len(shape))):
        raise UnknownOnnxShapeError
    return tuple(shape[axis] for axis in order)


def concatenated(step: OnnxStep) -> Shape:
    """The output shape of Concat: the lengths are added along one axis."""
    shapes = [step.shape(operand) for operand in range(len(step.inputs))]
    first = shapes[0]
    axis = step.axis(len(first))
    if any(len(shape) != len(first) for shape in shapes):
        raise UnknownOnnxShapeError
    return (*first[:axis], sum(shape[axis] for shape in shapes), *first[axis + 1 :])


def squeezed(step: OnnxStep) -> Shape:
    """The output shape of Squeeze: axes of length 1 are removed."""
    shape = step.shape(0)
    ones = tuple(axis for axis, length in enumerate(shape) if length == 1)
    removed = {wrap_axis(axis, len(shape)) for axis in step.setting("axes", 1, ones)}
    return tuple(length for axis, length in enumerate(shape) if axis not in removed)


def unsqueezed(step: OnnxStep) -> Shape:
    """The output shape of Unsqueeze: axes of length 1 are added."""
    shape, axes = step.shape(0), step.setting("axes", 1)
    rank = len(shape) + len(axes)
    new = {wrap_axis(axis, rank) for axis in axes}
    rest = iter(shape)
    if len(new) != len(axes):
        raise UnknownOnnxShapeError
    return tuple(1 if axis in new else next(rest) for axis in range(rank))


def gathered(step: OnnxStep) -> Shape:
    """The output shape of Gather: one axis is replaced by the axes of the indices."""
    shape = step.shape(0)
    axis = step.axis(len(shape))
    return (*shape[:axis], *step.shape(1), *shape[axis + 1 :])


def sliced(step: OnnxStep) -> Shape:
    """The output shape of Slice."""
    shape = list(step.shape(0))
    starts, ends = step.setting("starts", 1), step.setting("ends", 2)
    axes = step.setting("axes", 3, tuple(range(len(starts))))
    steps = step.setting("steps", 4, (1,) * len(starts))
    for start, end, axis, stride in zip(starts, ends, axes, steps, strict=False):
        index = wrap_axis(axis, len(shape))
        if stride == 0:
            raise UnknownOnnxShapeError
        shape[index] = len(range(*slice(start, end, stride).indices(shape[index])))
    return tuple(shape)


def padded(step: OnnxStep) -> Shape:
    """The output shape of Pad."""
    shape, pads = step.shape(0), step.setting("pads", 1)
    if len(pads) != 2 * len(shape) or (len(step.inputs) > 3 and step.node.inputs[3]):
        raise UnknownOnnxShapeError
    return tuple(length + pads[axis] + pads[axis + len(shape)] for axis, length in enumerate(shape))


def expanded(step: OnnxStep) -> Shape:
    """The output shape of Expand."""
    return broadcast(step.shape(0), step.numbers(1))


def tiled(step: OnnxStep) -> Shape:
    """The output shape of Tile."""
    return tuple(length * times for length, times in zip(step.shape(0), step.numbers(1), strict=True))


def depth_to_space(step: OnnxStep) -> Shape:
    """The output shape of DepthToSpace: channels become blocks of the image."""
    batch, channels, *image = step.shape(0)
    block = step.node.number("blocksize", 1)
    return (batch, channels // block**2, *(length * block for length in image))


def space_to_depth(step: OnnxStep) -> Shape:
    """The output shape of SpaceToDepth: blocks of the image become channels."""
    batch, channels, *image = step.shape(0)
    block = step.node.number("blocksize", 1)
    return (batch, channels * block**2, *(length // block for length in image))


def resized(step: OnnxStep) -> Shape:
    """The output shape of Resize: given sizes, or the lengths times integer scales."""
    if len(step.node.inputs) > 3 and step.node.inputs[3]:
        return step.numbers(3)
    scales = step.numbers(2 if len(step.node.inputs) > 2 else 1)
    return tuple(length * scale for length, scale in zip(step.shape(0), scales, strict=True))


def convolved(step: OnnxStep, weight_at: int = 1) -> Shape:
    """The output shape of a convolution."""
    image, weight = step.shape(0), step.shape(weight_at)
    if len(image) != len(weight) or len(image) < 3:
        raise UnknownOnnxShapeError
    return (image[0], weight[0], *_windowed(step, image[2:], weight[2:]))


def pooled(step: OnnxStep) -> Shape:
    """The output shape of a pooling layer."""
    image = step.shape(0)
    window = step.lists(step.node, "kernel_shape")
    if window is None or len(window) != len(image) - 2:
        raise UnknownOnnxShapeError
    return (*image[:2], *_windowed(step, image[2:], window))


def pooled_whole(step: OnnxStep) -> Shape:
    """The output shape of global pooling."""
    image = step.shape(0)
    return (*image[:2], *(1 for _ in image[2:]))


def deconvolved(step: OnnxStep) -> Shape:
    """The output shape of a transposed convolution."""
    image, weight = step.shape(0), step.shape(1)
    if len(image) != len(weight) or len(image) < 3:
        raise UnknownOnnxShapeError
    axes = len(image) - 2
    channels = weight[1] * step.node.number("group", 1)
    target = step.lists(step.node, "output_shape")
    if target is not None:
        return (image[0], channels, *target[-axes:])
    strides, dilations, pads = _window(step, axes)
    extra = _list(step, "output_padding", axes, 0)
    is_same = _padding(step).startswith("SAME")
    return (
        image[0],
        channels,
        *(
            length * stride
            if is_same
            else stride * (length - 1) + add + (size - 1) * dilation + 1 - pads[axis] - pads[axis + axes]
            for axis, (length, size, stride, dilation, add) in enumerate(
                zip(image[2:], weight[2:], strides, dilations, extra, strict=True)
            )
        ),
    )


def _windowed(step: OnnxStep, image: Shape, window: Shape) -> Shape:
    axes = len(image)
    strides, dilations, pads = _window(step, axes)
    padding, is_ceil = _padding(step), bool(step.node.number("ceil_mode", 0))
    lengths = []
    for axis, (length, size, stride, dilation) in enumerate(zip(image, window, strides, dilations, strict=True)):
        if padding.startswith("SAME"):
            lengths.append(-(-length // stride))
            continue
        room = length + pads[axis] + pads[axis + axes] - ((size - 1) * dilation + 1)
        lengths.append((-(-room // stride) if is_ceil else room // stride) + 1)
    return tuple(lengths)


def _window(step: OnnxStep, axes: int) -> tuple[Shape, Shape, Shape]:
    strides, dilations = _list(step, "strides", axes, 1), _list(step, "dilations", axes, 1)
    if min(strides) < 1 or min(dilations) < 1:
        raise UnknownOnnxShapeError
    return strides, dilations, _list(step, "pads", 2 * axes, 0)


def _list(step: OnnxStep, name: str, length: int, default: int) -> Shape:
    numbers = step.lists(step.node, name) or (default,) * length
    if len(numbers) != length:
        raise UnknownOnnxShapeError
    return numbers


def _padding(step: OnnxStep) -> str:
    attribute = step.node.attributes.get("auto_pad")
    return attribute.text if attribute is not None else ""


Rule = Callable[[OnnxStep], Shape]
"""Returns the shape of an operation's first output."""


def _same(step: OnnxStep) -> Shape:
    return step.shape(0)


def _elementwise(step: OnnxStep) -> Shape:
    return broadcast(*(step.shape(operand) for operand in range(len(step.inputs))))


def matmul(left: Shape, right: Shape) -> Shape:
    """The shape of a matrix product, with broadcast leading axes."""
    if not left or not right:
        raise UnknownOnnxShapeError
    rows, columns = left[-2:-1], right[-1:] if len(right) > 1 else ()
    return (*broadcast(left[:-2], right[:-2]), *rows, *columns)


def _gemm(step: OnnxStep) -> Shape:
    left, right = step.shape(0), step.shape(1)
    if len(left) != 2 or len(right) != 2:
        raise UnknownOnnxShapeError
    return left[1 if step.node.number("transA", 0) else 0], right[0 if step.node.number("transB", 0) else 1]


def _reduced(step: OnnxStep) -> Shape:
    shape = step.shape(0)
    axes = step.setting("axes", 1, tuple(range(len(shape)))) or tuple(range(len(shape)))
    removed = {wrap_axis(axis, len(shape)) for axis in axes}
    if step.node.number("keepdims", 1):
        return tuple(1 if axis in removed else length for axis, length in enumerate(shape))
    return tuple(length for axis, length in enumerate(shape) if axis not in removed)


def _recurrent(step: OnnxStep) -> Shape:
    length, batch, _ = step.shape(0)
    directions, units = step.shape(2)[0], step.shape(2)[-1]
    if step.node.number("layout", 0):
        raise UnknownOnnxShapeError
    return length, directions, batch, units


def _each(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, Rule] = {
    **_each(_same, "Relu Sigmoid Tanh LeakyRelu Clip Elu Selu Celu Softmax LogSoftmax Hardmax Identity Cast CastLike"),
    **_each(_same, "Dropout BatchNormalization InstanceNormalization LayerNormalization GroupNormalization"),
    **_each(_same, "RMSNormalization SimplifiedLayerNormalization SkipLayerNormalization LpNormalization LRN"),
    **_each(_same, "MeanVarianceNormalization HardSwish HardSigmoid Gelu FastGelu BiasGelu QuickGelu Erf Exp Log Sqrt"),
    **_each(_same, "Neg Abs Floor Ceil Round Softplus Softsign Reciprocal Sign Mish Swish ThresholdedRelu Shrink Not"),
    **_each(_same, "QuantizeLinear DequantizeLinear DynamicQuantizeLinear Quant IntQuant FloatQuant BipolarQuant"),
    **_each(_same, "CumSum IsNaN IsInf Trilu ScatterND ScatterElements Sin Cos PRelu Bernoulli"),
    **_each(_elementwise, "Add Sub Mul Div Pow Max Min Sum Mean Where Equal Greater GreaterOrEqual Less"),
    **_each(_elementwise, "LessOrEqual And Or Xor Mod"),
    **_each(_reduced, "ReduceMean ReduceSum ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceLogSumExp"),
    **_each(pooled, "MaxPool AveragePool LpPool"),
    **_each(pooled_whole, "GlobalAveragePool GlobalMaxPool GlobalLpPool"),
    **_each(convolved, "Conv FusedConv ConvInteger"),
    **_each(lambda step: convolved(step, 3), "QLinearConv"),
    **_each(lambda step: matmul(step.shape(0), step.shape(1)), "MatMul MatMulInteger"),
    **_each(lambda step: matmul(step.shape(0), step.shape(3)), "QLinearMatMul"),
    **_each(_gemm, "Gemm FusedGemm"),
    **_each(_recurrent, "LSTM GRU RNN"),
    **_each(lambda step: (len(step.shape(0)),), "Shape"),
    **_each(lambda step: step.numbers(0), "ConstantOfShape"),
    "ConvTranspose": deconvolved,
    "Concat": concatenated,
    "DepthToSpace": depth_to_space,
    "Expand": expanded,
    "Flatten": flattened,
    "Gather": gathered,
    "Pad": padded,
    "Resize": resized,
    "Upsample": resized,
    "Reshape": reshaped,
    "Slice": sliced,
    "SpaceToDepth": space_to_depth,
    "Squeeze": squeezed,
    "Tile": tiled,
    "Transpose": transposed,
    "Unsqueeze": unsqueezed,
}
