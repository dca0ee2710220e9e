"""What each ONNX operation does to channels, as far as its attributes and constants say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from prunectl.channels.graph import OpKind, WeightView
from prunectl.channels.onnx.shapes import StaticValues

_SOFTMAX_BY_AXIS = 13
Lowering = tuple[OpKind, tuple[str, ...], Mapping[str, Any]]
"""Kind, inputs, attributes."""


@dataclass(frozen=True, slots=True)
class OnnxOpContext:
    """A node, and what is known around it."""

    node: Any
    known: StaticValues
    views: Mapping[str, WeightView]
    opset: int

    def attribute(self, name: str, default: Any) -> Any:
        """Return an attribute, lists as tuples."""
        for found in self.node.attribute:
            if found.name == name:
                value = {2: found.i, 1: found.f, 3: found.s}.get(found.type)
                return value if value is not None else tuple(found.ints)
        return default

    def input(self, place: int) -> str:
        """Return the name of an input; empty where it is left out."""
        return self.node.input[place] if place < len(self.node.input) else ""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a value; LookupError if it is not known."""
        return self.known.shapes[name]

    def constant(self, place: int) -> tuple[int, ...]:
        """Return an input that lists whole numbers; LookupError if it is not the same in every run."""
        return tuple(int(number) for number in self.known.constants[self.input(place)].reshape(-1))

    @property
    def first(self) -> tuple[int, ...]:
        """Shape of what goes in."""
        return self.shape(self.input(0))

    @property
    def result(self) -> tuple[int, ...]:
        """Shape of what comes out."""
        return self.shape(self.node.output[0])

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of all inputs."""
        return tuple(self.node.input)


def _each(seen: OnnxOpContext) -> Lowering:
    return OpKind.EACH, seen.inputs, {}


def _first(seen: OnnxOpContext) -> Lowering:
    return OpKind.EACH, seen.inputs[:1], {}


def _convolution(seen: OnnxOpContext) -> Lowering:
    is_transposed = seen.node.op_type == "ConvTranspose"
    return OpKind.CONVOLUTION, seen.inputs, {"groups": seen.attribute("group", 1), "is_transposed": is_transposed}


def _gemm(seen: OnnxOpContext) -> Lowering:
    if seen.attribute("transA", 0):
        return _unknown(seen)
    return OpKind.LINEAR, seen.inputs, {"in_axis": 1 if seen.attribute("transB", 0) else 0}


def _matmul(seen: OnnxOpContext) -> Lowering:
    if seen.input(0) not in seen.views and seen.input(1) not in seen.views:
        return OpKind.PRODUCT, seen.inputs, {}
    if len(seen.shape(seen.input(1))) != 2 or not seen.result:
        return _unknown(seen)
    return OpKind.LINEAR, seen.inputs, {"in_axis": 0}


def _recurrent(seen: OnnxOpContext) -> Lowering:
    lengths, peepholes = seen.input(4), seen.input(7)
    if not {seen.input(1), seen.input(2)} <= seen.views.keys() or (seen.input(3) and seen.input(3) not in seen.views):
        return _unknown(seen)
    if lengths or peepholes or seen.attribute("layout", 0) or not _is_silent_at_zero(seen):
        return _unknown(seen)
    units = seen.attribute("hidden_size", 0) or seen.shape(seen.input(2))[-1]
    states = tuple("" if _is_zero(seen, name) else name for name in (seen.input(5), seen.input(6)))
    gates = seen.shape(seen.input(1))[-2] // units
    inputs = (*(seen.input(place) for place in range(4)), *states)
    return OpKind.RECURRENT, inputs, {"units": units, "gates": gates}


def _is_silent_at_zero(seen: OnnxOpContext) -> bool:
    """Whether a unit whose weights are zero stays at zero."""
    said = [tuple(part.strings) for part in seen.node.attribute if part.name == "activations"]
    return all(name in {b"Sigmoid", b"Tanh", b"Relu"} for names in said for name in names)


def _is_zero(seen: OnnxOpContext, name: str) -> bool:
    found = seen.known.constants.get(name)
    return found is not None and name not in seen.views and not found.any()


def _softmax(seen: OnnxOpContext) -> Lowering:
    rank = len(seen.first)
    # Before opset 13 all axes behind were one.
    axis = seen.attribute("axis", -1 if seen.opset >= _SOFTMAX_BY_AXIS else 1) % rank
    return _stretch(seen, (axis,) if seen.opset >= _SOFTMAX_BY_AXIS else tuple(range(axis, rank)))


def _layer_norm(seen: OnnxOpContext) -> Lowering:
    rank = len(seen.first)
    return _stretch(seen, tuple(range(seen.attribute("axis", -1) % rank, rank)))


def _norm(seen: OnnxOpContext) -> Lowering:
    if seen.attribute("training_mode", 0) or len([name for name in seen.node.output if name]) > 1:
        return _unknown(seen)
    return OpKind.NORM, seen.inputs, {}


def _concat(seen: OnnxOpContext) -> Lowering:
    return OpKind.CONCAT, seen.inputs, {"axis": seen.attribute("axis", 1)}


def _split(seen: OnnxOpContext) -> Lowering:
    axis = seen.attribute("axis", 0) % len(seen.first)
    sizes = tuple(seen.shape(name)[axis] for name in seen.node.output)
    return OpKind.SPLIT, seen.inputs[:1], {"axis": axis, "sizes": sizes}


def _transpose(seen: OnnxOpContext) -> Lowering:
    backwards = tuple(reversed(range(len(seen.first))))
    return OpKind.TRANSPOSE, seen.inputs, {"order": seen.attribute("perm", backwards)}


def _reshape(seen: OnnxOpContext) -> Lowering:
    return OpKind.RESHAPE, seen.inputs[:1], {}


def _stretch(seen: OnnxOpContext, axes: tuple[int, ...]) -> Lowering:
    rank = len(seen.first)
    return OpKind.STRETCH, seen.inputs[:1], {"axes": tuple(sorted({axis % rank for axis in axes}))}


def _window(seen: OnnxOpContext) -> Lowering:
    if len([name for name in seen.node.output if name]) > 1:
        return _unknown(seen)
    return _stretch(seen, tuple(range(2, len(seen.first))))


def _resize(seen: OnnxOpContext) -> Lowering:
    if len(seen.first) < 3:
        return _unknown(seen)
    return _stretch(seen, (*range(2, len(seen.first)), *_different(seen)))


def _expand(seen: OnnxOpContext) -> Lowering:
    return _stretch(seen, _different(seen)) if len(seen.first) == len(seen.result) else _unknown(seen)


def _different(seen: OnnxOpContext) -> tuple[int, ...]:
    return tuple(axis for axis, pair in enumerate(zip(seen.first, seen.result, strict=True)) if len(set(pair)) > 1)


def _reduce(seen: OnnxOpContext) -> Lowering:
    axes = seen.constant(1) if seen.input(1) else seen.attribute("axes", ())
    if not axes and seen.attribute("noop_with_empty_axes", 0):
        return _first(seen)
    return _stretch(seen, axes or tuple(range(len(seen.first))))


def _pad(seen: OnnxOpContext) -> Lowering:
    rank = len(seen.first)
    pads = seen.constant(1) if seen.input(1) else seen.attribute("pads", ())
    axes = seen.constant(3) if seen.input(3) else tuple(range(rank))
    half = len(pads) // 2
    return _stretch(seen, tuple(axis for number, axis in enumerate(axes) if pads[number] or pads[number + half]))


def _slice(seen: OnnxOpContext) -> Lowering:
    rank = len(seen.first)
    starts, stops = (
        seen.constant(place) if seen.input(1) else seen.attribute(name, ())
        for place, name in enumerate(("starts", "ends"), 1)
    )
    axes = seen.constant(3) if seen.input(3) else seen.attribute("axes", tuple(range(len(starts))))
    steps = seen.constant(4) if seen.input(4) else (1,) * len(starts)
    slices = [
        (axis % rank, *slice(start, stop, step).indices(seen.first[axis]))
        for start, stop, step, axis in zip(starts, stops, steps, axes, strict=True)
    ]
    return OpKind.SLICE, seen.inputs[:1], {"slices": tuple(slices)}


def _gather(seen: OnnxOpContext) -> Lowering:
    axis = seen.attribute("axis", 0) % len(seen.first)
    if seen.input(0) in seen.views:
        if axis or len(seen.first) != 2:
            return _unknown(seen)
        return OpKind.EMBEDDING, seen.inputs, {}
    if len(seen.known.constants[seen.input(1)].shape) > 1:
        return _unknown(seen)
    return _stretch(seen, (axis,))


def _unknown(seen: OnnxOpContext) -> Lowering:
    return OpKind.UNKNOWN, seen.inputs, {}


_ONE_BY_ONE = """Relu LeakyRelu Sigmoid Tanh Elu Selu Celu HardSigmoid HardSwish Softplus Softsign Gelu Mish Swish Erf
Exp Log Sqrt Abs Neg Floor Ceil Round Sign Reciprocal Sin Cos Tan Atan Not IsNaN IsInf ThresholdedRelu Shrink Identity
Cast Add Sub Mul Div Pow Min Max Mean Sum PRelu Clip Where Equal Greater Less GreaterOrEqual LessOrEqual And Or Xor
Mod"""
_READERS: tuple[tuple[str, Callable[[OnnxOpContext], Lowering]], ...] = (
    (_ONE_BY_ONE, _each),
    ("Dropout CastLike", _first),
    ("Conv ConvTranspose", _convolution),
    ("Gemm", _gemm),
    ("MatMul", _matmul),
    ("LSTM GRU RNN", _recurrent),
    ("Softmax LogSoftmax Hardmax", _softmax),
    ("LayerNormalization", _layer_norm),
    ("BatchNormalization InstanceNormalization", _norm),
    ("Concat", _concat),
    ("Split", _split),
    ("Transpose", _transpose),
    ("Reshape Flatten Squeeze Unsqueeze", _reshape),
    ("MaxPool AveragePool LpPool GlobalAveragePool GlobalMaxPool GlobalLpPool", _window),
    ("Resize Upsample", _resize),
    ("Expand", _expand),
    ("ReduceMean ReduceMax ReduceMin ReduceSum ReduceProd ReduceL1 ReduceL2 ReduceSumSquare", _reduce),
    ("Pad", _pad),
    ("Slice", _slice),
    ("Gather", _gather),
)
KINDS: Mapping[str, Callable[[OnnxOpContext], Lowering]] = {
    op: reader for ops, reader in _READERS for op in ops.split()
}


def lower(seen: OnnxOpContext) -> Lowering:
    """Return what an operation does to channels; unknown where the file does not say enough."""
    reader = KINDS.get(seen.node.op_type)
    if reader is None:
        return _unknown(seen)
    try:
        found = reader(seen)
        for name in (*found[1], *seen.node.output):
            if name and 0 in seen.shape(name):
                return _unknown(seen)
    except LookupError:
        return _unknown(seen)
    return found
