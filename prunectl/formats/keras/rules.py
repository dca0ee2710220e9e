"""How Keras layers turn shapes into shapes: one rule for each class that is known."""

from __future__ import annotations

from collections.abc import Callable

from prunectl.formats.keras import attention, recurrent
from prunectl.formats.keras.shapes import UnknownShapeError, broadcast, checked, plain
from prunectl.formats.keras.step import Step
from prunectl.formats.keras.windows import WINDOW_RULES
from prunectl.formats.lengths import Length, Shape, product

Rule = Callable[[Step], Shape]


def output(step: Step) -> Shape | None:
    """Return the shape of a layer's output, if it is known."""
    rule = RULES.get(step.kind)
    try:
        return None if rule is None else checked(rule(step))
    except UnknownShapeError:
        return None


def _same(step: Step) -> Shape:
    return step.shape()


def _merged(step: Step) -> Shape:
    return broadcast(step.everything)


def _elementwise(step: Step) -> Shape:
    """An operation of TensorFlow that Keras 2 recorded as a layer."""
    name = step.word("function") or step.word("op")
    if name.rpartition(".")[2].replace("_", "") not in _ELEMENTWISE:
        raise UnknownShapeError
    return broadcast(step.everything)


def _merge_of_keras_1(step: Step) -> Shape:
    mode = step.word("mode")
    if mode in {"sum", "mul", "ave", "max"}:
        return broadcast(step.everything)
    if mode == "concat":
        return _concatenated(Step(step.kind, {"axis": step.number("concat_axis", -1)}, step.inputs))
    raise UnknownShapeError


def _concatenated(step: Step) -> Shape:
    shapes = step.everything
    axis = _axis(step.number("axis", -1), len(shapes[0]))
    if len({len(shape) for shape in shapes}) != 1:
        raise UnknownShapeError
    lengths = [shape[axis] for shape in shapes]
    whole = None if None in lengths else sum(length for length in lengths if length is not None)
    rest = broadcast(shapes)
    return (*rest[:axis], whole, *rest[axis + 1 :])


def _axis(axis: int, rank: int) -> int:
    """Return an axis that Keras counts with the batch, counted without it."""
    found = axis + rank if axis < 0 else axis - 1
    if not 0 <= found < rank:
        raise UnknownShapeError
    return found


def _flat(step: Step) -> Shape:
    shape = step.inputs[0] if step.inputs else None
    # Even of an unknown shape it is known that one axis is left.
    return (None if shape is None else product(shape),)


def _reshaped(step: Step) -> Shape:
    target = plain(step.config.get("target_shape"))
    if not isinstance(target, list) or not all(type(length) is int for length in target) or target.count(-1) > 1:
        raise UnknownShapeError
    if -1 not in target:
        return tuple(target)
    whole = product(step.inputs[0]) if step.inputs and step.inputs[0] is not None else None
    known = product(length for length in target if length != -1)
    missing: Length = whole // known if whole is not None and known else None
    return tuple(missing if length == -1 else length for length in target)


def _permuted(step: Step) -> Shape:
    shape = step.shape()
    order = step.numbers("dims", len(shape))
    if sorted(order) != list(range(1, len(shape) + 1)):
        raise UnknownShapeError
    return tuple(shape[place - 1] for place in order)


def _repeated(step: Step) -> Shape:
    return (step.number("n"), *step.shape())


def _embedded(step: Step) -> Shape:
    return (*step.shape(), step.number("output_dim"))


def _dense(step: Step) -> Shape:
    return (*step.shape()[:-1], step.number("units"))


_SAME = (
    *("Activation", "ReLU", "LeakyReLU", "PReLU", "ELU", "ThresholdedReLU", "Softmax", "Dropout", "GaussianNoise"),
    *("GaussianDropout", "AlphaDropout", "SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D", "Masking"),
    *("BatchNormalization", "SyncBatchNormalization", "LayerNormalization", "GroupNormalization", "RMSNormalization"),
    *("UnitNormalization", "Normalization", "ActivityRegularization", "Rescaling", "Identity", "QuantizeLayer"),
    *("RandomFlip", "RandomRotation", "RandomZoom", "RandomTranslation", "RandomContrast", "RandomBrightness"),
)
_ELEMENTWISE = frozenset(
    {
        *("add", "addv2", "subtract", "sub", "multiply", "mul", "truediv", "divide", "divnonan", "realdiv", "pow"),
        *("maximum", "minimum", "relu", "relu6", "leakyrelu", "elu", "selu", "gelu", "silu", "swish", "sigmoid"),
        *("tanh", "softmax", "softplus", "exp", "log", "sqrt", "rsqrt", "square", "abs", "negative", "neg", "sign"),
        *("cast", "clipbyvalue", "identity", "stopgradient", "dropout", "l2normalize", "round", "floor", "clip"),
    }
)
RULES: dict[str, Rule] = {
    **dict.fromkeys(_SAME, _same),
    **dict.fromkeys(("Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum"), _merged),
    **dict.fromkeys(("TFOpLambda", "TensorFlowOpLayer"), _elementwise),
    **WINDOW_RULES,
    **recurrent.RULES,
    **attention.RULES,
    "Concatenate": _concatenated,
    "Dense": _dense,
    "Embedding": _embedded,
    "Flatten": _flat,
    "Merge": _merge_of_keras_1,
    "Permute": _permuted,
    "RepeatVector": _repeated,
    "Reshape": _reshaped,
}
