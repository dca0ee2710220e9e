"""The rules for ONNX operators: what each does to channels, and which attributes and inputs hold channel counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from prunectl.channels.graph import OpKind, WeightView
from prunectl.channels.onnx.shapes import MICROSOFT, StaticValues
from prunectl.onnx_graph import STANDARD_DOMAINS, find_attribute, get_attribute, input_of

if TYPE_CHECKING:
    from prunectl.channels.onnx.adapter import SizeConstants

_SOFTMAX_BY_AXIS = 13
_KEEPING_ZERO = frozenset({"Relu", "LeakyRelu", "Tanh"})
"""Fused activations that map 0 to 0, so that a zeroed channel stays zero."""
_STATES = (5, 6)
"""The positions of the initial states among the inputs of a recurrent layer."""
_BACK = -(1 << 31)
"""The end of a slice that runs backwards to the first element."""
Lowering = tuple[OpKind, tuple[str, ...], Mapping[str, Any]]
"""Kind, inputs, attributes."""


@dataclass(frozen=True, slots=True)
class OnnxOpContext:
    """A node, and the shapes, constants and weight views of its graph."""

    node: Any
    static: StaticValues
    views: Mapping[str, WeightView]
    opset: int

    def attribute(self, name: str, default: Any) -> Any:
        """The value of an attribute; a list as a tuple."""
        return get_attribute(self.node, name, default)

    def input(self, position: int) -> str:
        """The name of an input; empty if it is left out."""
        return input_of(self.node, position)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a value; LookupError if it is not known."""
        return self.static.shapes[name]

    def constant(self, position: int) -> tuple[int, ...]:
        """The integers in a constant input; LookupError if the input is not constant."""
        return tuple(int(number) for number in self.static.constants[self.input(position)].reshape(-1))

    @property
    def first(self) -> tuple[int, ...]:
        """The shape of the first input."""
        return self.shape(self.input(0))

    @property
    def result(self) -> tuple[int, ...]:
        """The shape of the first output."""
        return self.shape(self.node.output[0])

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of all inputs."""
        return tuple(self.node.input)


@dataclass(frozen=True, slots=True)
class OnnxOpRule:
    """What an operator does to channels, and how a node is updated after some were removed."""

    lower: Callable[[OnnxOpContext], Lowering]
    resize: Callable[[Any, SizeConstants], None] | None = None


def _elementwise_first(op: OnnxOpContext) -> Lowering:
    return OpKind.ELEMENTWISE, op.inputs[:1], {}


def _convolution(op: OnnxOpContext) -> Lowering:
    is_transposed = op.node.op_type == "ConvTranspose"
    return OpKind.CONVOLUTION, op.inputs, {"groups": op.attribute("group", 1), "is_transposed": is_transposed}


def _resize_groups(node: Any, sizes: SizeConstants) -> None:
    """Set the groups of a depthwise convolution to the number of its input channels."""
    groups = get_attribute(node, "group", 1)
    if groups > 1 and groups == sizes.before[node.input[0]][1]:
        find_attribute(node, "group").i = sizes.after.shape(node.input[0])[1]


def _gemm(op: OnnxOpContext) -> Lowering:
    if op.attribute("transA", 0):
        return _unknown(op)
    return OpKind.LINEAR, op.inputs, {"in_axis": 1 if op.attribute("transB", 0) else 0}


def _matmul(op: OnnxOpContext) -> Lowering:
    if op.input(0) not in op.views and op.input(1) not in op.views:
        return OpKind.MATMUL, op.inputs, {}
    if len(op.shape(op.input(1))) != 2 or not op.result:
        return _unknown(op)
    return OpKind.LINEAR, op.inputs, {"in_axis": 0}


def _fused_linear(op: OnnxOpContext) -> Lowering:
    is_linear = len(op.shape(op.input(1))) == 2 and set(op.inputs) & op.views.keys()
    return _with_activation(op, _gemm(op)) if is_linear else _unknown(op)


def _fused_convolution(op: OnnxOpContext) -> Lowering:
    # The optional fourth input is added to the output.
    return _unknown(op) if op.input(3) else _with_activation(op, _convolution(op))


def _with_activation(op: OnnxOpContext, lowering: Lowering) -> Lowering:
    """The same lowering, with its output channels locked if the fused activation does not map 0 to 0."""
    activation = op.attribute("activation", "Relu")
    keeps_zero = activation in _KEEPING_ZERO
    if activation == "Clip" and (limits := find_attribute(op.node, "activation_params")) is not None:
        low, high = limits.floats if len(limits.floats) == 2 else (1, 1)
        keeps_zero = low <= 0 <= high
    kind, inputs, attributes = lowering
    return lowering if keeps_zero else (kind, inputs, {**attributes, "lock": f"applies {activation} to its output"})


def _recurrent(op: OnnxOpContext) -> Lowering:
    lengths, peepholes = op.input(4), op.input(7)
    if not {op.input(1), op.input(2)} <= op.views.keys() or (op.input(3) and op.input(3) not in op.views):
        return _unknown(op)
    if lengths or peepholes or op.attribute("layout", 0) or not _has_known_activations(op):
        return _unknown(op)
    units = op.attribute("hidden_size", 0) or op.shape(op.input(2))[-1]
    states = tuple("" if _is_zero(op, name) else name for name in (op.input(5), op.input(6)))
    gates = op.shape(op.input(1))[-2] // units
    inputs = (*(op.input(position) for position in range(4)), *states)
    return OpKind.RECURRENT, inputs, {"units": units, "gates": gates}


def _has_known_activations(op: OnnxOpContext) -> bool:
    """Whether the activations are supported: sigmoid, tanh or ReLU."""
    return set(op.attribute("activations", ())) <= {"Sigmoid", "Tanh", "Relu"}


def _is_zero(op: OnnxOpContext, name: str) -> bool:
    constant = op.static.constants.get(name)
    return constant is not None and name not in op.views and not constant.any()


def _resize_units(node: Any, sizes: SizeConstants) -> None:
    """Update the number of units of a recurrent layer, and remove its initial states if they are zeros."""
    name = next(filter(None, node.output))
    if (units := find_attribute(node, "hidden_size")) is not None:
        units.i = sizes.after.shape(name)[-1]
    for position in _STATES:
        state = input_of(node, position)
        if state in sizes.constants and not sizes.constants[state].any():
            # Without an initial state the layer starts from zeros.
            node.input[position] = ""
            sizes.replaced.add(state)


def _softmax(op: OnnxOpContext) -> Lowering:
    rank = len(op.first)
    # Before opset 13, softmax ran over `axis` and all axes after it together.
    axis = op.attribute("axis", -1 if op.opset >= _SOFTMAX_BY_AXIS else 1) % rank
    return _along_axes(op, (axis,) if op.opset >= _SOFTMAX_BY_AXIS else tuple(range(axis, rank)))


def _layer_norm(op: OnnxOpContext) -> Lowering:
    rank = len(op.first)
    return _along_axes(op, tuple(range(op.attribute("axis", -1) % rank, rank)))


def _channel_norm(op: OnnxOpContext) -> Lowering:
    if op.attribute("training_mode", 0) or len([name for name in op.node.output if name]) > 1:
        return _unknown(op)
    return OpKind.CHANNEL_NORM, op.inputs, {}


def _split(op: OnnxOpContext) -> Lowering:
    axis = op.attribute("axis", 0) % len(op.first)
    sizes = tuple(op.shape(name)[axis] for name in op.node.output)
    return OpKind.SPLIT, op.inputs[:1], {"axis": axis, "sizes": sizes}


def _resize_split(node: Any, sizes: SizeConstants) -> None:
    """Write the new size of each part, which may be left out if all are equal."""
    axis = get_attribute(node, "axis", 0) % len(sizes.before[node.input[0]])
    parts = [sizes.after.shape(name)[axis] for name in node.output]
    if (listed := find_attribute(node, "split")) is not None:
        listed.ints[:] = parts
    elif input_of(node, 1):
        sizes.replace(node, 1, parts)
    elif len(set(parts)) > 1:
        if (num_outputs := find_attribute(node, "num_outputs")) is not None:
            node.attribute.remove(num_outputs)
        del node.input[1:]
        node.input.append(sizes.add("sizes", np.array(parts, np.int64)))


def _transpose(op: OnnxOpContext) -> Lowering:
    backwards = tuple(reversed(range(len(op.first))))
    return OpKind.TRANSPOSE, op.inputs, {"order": op.attribute("perm", backwards)}


def _reshape(op: OnnxOpContext) -> Lowering:
    return OpKind.RESHAPE, op.inputs[:1], {}


def _resize_shape(node: Any, sizes: SizeConstants) -> None:
    """Write the new lengths into the constant that holds the shape."""
    position = 3 if node.op_type == "Resize" else 1
    constant = sizes.constants.get(input_of(node, position))
    if constant is None or not constant.size:
        return
    before, after = sizes.before[node.output[0]], sizes.after.shape(node.output[0])
    axes = get_attribute(node, "axes", tuple(range(constant.size)))
    # 0 (copy) and -1 (infer) stay: the runtime takes these lengths from the smaller input.
    lengths = [
        after[axis] if number == before[axis] and number > 0 else number
        for axis, number in zip(axes, map(int, constant), strict=True)
    ]
    if lengths != list(map(int, constant)):
        sizes.update(node, position, lengths)


def _along_axes(op: OnnxOpContext, axes: tuple[int, ...]) -> Lowering:
    return OpKind.ALONG_AXES, op.inputs[:1], {"axes": axes}


def _pool(op: OnnxOpContext) -> Lowering:
    if len([name for name in op.node.output if name]) > 1:
        return _unknown(op)
    return _along_axes(op, tuple(range(2, len(op.first))))


def _resize(op: OnnxOpContext) -> Lowering:
    if len(op.first) < 3:
        return _unknown(op)
    return _along_axes(op, (*range(2, len(op.first)), *_resized_axes(op)))


def _expand(op: OnnxOpContext) -> Lowering:
    return _along_axes(op, _resized_axes(op)) if len(op.first) == len(op.result) else _unknown(op)


def _resized_axes(op: OnnxOpContext) -> tuple[int, ...]:
    return tuple(axis for axis, pair in enumerate(zip(op.first, op.result, strict=True)) if len(set(pair)) > 1)


def _reduce(op: OnnxOpContext) -> Lowering:
    axes = op.constant(1) if op.input(1) else op.attribute("axes", ())
    if not axes and op.attribute("noop_with_empty_axes", 0):
        return _elementwise_first(op)
    return _along_axes(op, axes or tuple(range(len(op.first))))


def _pad(op: OnnxOpContext) -> Lowering:
    rank = len(op.first)
    pads = op.constant(1) if op.input(1) else op.attribute("pads", ())
    axes = op.constant(3) if op.input(3) else tuple(range(rank))
    half = len(pads) // 2
    return _along_axes(op, tuple(axis for number, axis in enumerate(axes) if pads[number] or pads[number + half]))


def _slice(op: OnnxOpContext) -> Lowering:
    rank = len(op.first)
    starts, stops = (
        op.constant(position) if op.input(1) else op.attribute(name, ())
        for position, name in enumerate(("starts", "ends"), 1)
    )
    axes = op.constant(3) if op.input(3) else op.attribute("axes", tuple(range(len(starts))))
    steps = op.constant(4) if op.input(4) else (1,) * len(starts)
    slices = [
        (axis % rank, *slice(start, stop, step).indices(op.first[axis]))
        for start, stop, step, axis in zip(starts, stops, steps, axes, strict=True)
    ]
    return OpKind.SLICE, op.inputs[:1], {"slices": tuple(slices)}


def _resize_slice(node: Any, sizes: SizeConstants) -> None:
    """Write the new bounds of slices, which count only the kept channels in front of the old bounds."""
    data = node.input[0]
    before, after = sizes.before[data], sizes.after.shape(data)
    slices = sizes.ops[tuple(node.output)].attributes.get("slices", ())
    if all(before[axis] == after[axis] for axis, *_ in slices):
        return
    for position, name in enumerate(("starts", "ends"), 1):
        bounds = [
            sizes.after.num_kept_before(data, part[0], part[position])
            if before[part[0]] != after[part[0]]
            else part[position]
            for part in slices
        ]
        if (listed := find_attribute(node, name)) is not None:
            listed.ints[:] = bounds
        else:
            sizes.replace(node, position, [_BACK if number < 0 else number for number in bounds])


def _gather(op: OnnxOpContext) -> Lowering:
    axis = op.attribute("axis", 0) % len(op.first)
    if op.input(0) in op.views:
        if axis or len(op.first) != 2:
            return _unknown(op)
        return OpKind.EMBEDDING, op.inputs, {}
    if len(op.static.constants[op.input(1)].shape) > 1:
        return _unknown(op)
    return _along_axes(op, (axis,))


def _unknown(op: OnnxOpContext) -> Lowering:
    return OpKind.UNKNOWN, op.inputs, {}


_ELEMENTWISE = """Relu LeakyRelu Sigmoid Tanh Elu Selu Celu HardSigmoid HardSwish Softplus Softsign Gelu Mish Swish Erf
Exp Log Sqrt Abs Neg Floor Ceil Round Sign Reciprocal Sin Cos Tan Atan Not IsNaN IsInf ThresholdedRelu Shrink Identity
Cast Add Sub Mul Div Pow Min Max Mean Sum PRelu Clip Where Equal Greater Less GreaterOrEqual LessOrEqual And Or Xor
Mod"""
_ROWS: tuple[tuple[str, OnnxOpRule], ...] = (
    (_ELEMENTWISE, OnnxOpRule(lambda op: (OpKind.ELEMENTWISE, op.inputs, {}))),
    ("Dropout CastLike", OnnxOpRule(_elementwise_first)),
    ("Conv ConvTranspose", OnnxOpRule(_convolution, _resize_groups)),
    ("Gemm", OnnxOpRule(_gemm)),
    ("MatMul", OnnxOpRule(_matmul)),
    ("LSTM GRU RNN", OnnxOpRule(_recurrent, _resize_units)),
    ("Softmax LogSoftmax Hardmax", OnnxOpRule(_softmax)),
    ("LayerNormalization", OnnxOpRule(_layer_norm)),
    ("BatchNormalization InstanceNormalization", OnnxOpRule(_channel_norm)),
    ("Concat", OnnxOpRule(lambda op: (OpKind.CONCAT, op.inputs, {"axis": op.attribute("axis", 1)}))),
    ("Split", OnnxOpRule(_split, _resize_split)),
    ("Transpose", OnnxOpRule(_transpose)),
    ("Reshape", OnnxOpRule(_reshape, _resize_shape)),
    ("Flatten Squeeze Unsqueeze", OnnxOpRule(_reshape)),
    ("MaxPool AveragePool LpPool GlobalAveragePool GlobalMaxPool GlobalLpPool", OnnxOpRule(_pool)),
    ("Resize", OnnxOpRule(_resize, _resize_shape)),
    ("Upsample", OnnxOpRule(_resize)),
    ("Expand", OnnxOpRule(_expand, _resize_shape)),
    ("ReduceMean ReduceMax ReduceMin ReduceSum ReduceProd ReduceL1 ReduceL2 ReduceSumSquare", OnnxOpRule(_reduce)),
    ("Pad", OnnxOpRule(_pad)),
    ("Slice", OnnxOpRule(_slice, _resize_slice)),
    ("Gather", OnnxOpRule(_gather)),
)
RULES: Mapping[str, OnnxOpRule] = {op: rule for ops, rule in _ROWS for op in ops.split()}
_FUSED: Mapping[str, OnnxOpRule] = {
    **dict.fromkeys(("Gelu", "FastGelu", "QuickGelu", "BiasGelu"), RULES["Gelu"]),
    **dict.fromkeys(("FusedMatMul", "FusedGemm"), OnnxOpRule(_fused_linear)),
    "FusedConv": OnnxOpRule(_fused_convolution, _resize_groups),
}
"""The rules for fused operators of onnxruntime; those without a rule lock their channels."""


def rule_of(node: Any) -> OnnxOpRule | None:
    """The rule for the operator of a node; None if there is none."""
    rules = RULES if node.domain in STANDARD_DOMAINS else _FUSED if node.domain == MICROSOFT else {}
    return rules.get(node.op_type)


def lower(op: OnnxOpContext) -> Lowering:
    """Translate a node; UNKNOWN if there is no rule, or the shapes and constants that the rule needs are not known."""
    rule = rule_of(op.node) or OnnxOpRule(_unknown)
    try:
        lowering = rule.lower(op)
        for name in (*lowering[1], *op.node.output):
            if name and 0 in op.shape(name):
                return _unknown(op)
    except LookupError:
        return _unknown(op)
    return lowering
