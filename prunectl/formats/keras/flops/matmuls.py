"""By class of Keras layer: its matrix products, its output shape, and the weights in the products."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator

from prunectl.formats.base import Length, Role, Shape, Tensor, numel
from prunectl.formats.budgets import MAX_LAYER_WEIGHTS
from prunectl.formats.keras.config import PRUNED_PREFIX, modern_name, untuple
from prunectl.formats.keras.flops import sequences
from prunectl.formats.keras.flops.shapes import (
    LOOKUP_RULES,
    WINDOW_RULES,
    LayerCall,
    Matmul,
    UnknownShapeError,
    broadcast,
    scale_dim,
    validate_shape,
)


def matmuls(call: LayerCall) -> tuple[Matmul, ...]:
    """The matrix products of a layer; raises UnknownShapeError if they depend on an unknown shape."""
    return tuple(_MULTIPLYING[call.kind](call))


def is_multiplying(kind: str) -> bool:
    """Whether layers of this class multiply at all."""
    return kind in _MULTIPLYING


def _dense(call: LayerCall) -> Iterator[Matmul]:
    shape = call.shape()
    if not shape:
        raise UnknownShapeError
    yield Matmul("kernel", (shape[-1], call.number("units")), shape[:-1])


def _convolution(call: LayerCall) -> Iterator[Matmul]:
    _, channels = call.image()
    kernel, groups = call.numbers("kernel_size", call.axes), call.number("groups", 1)
    if groups < 1:
        raise UnknownShapeError
    inner = None if channels is None else channels // groups
    yield Matmul("kernel", (*kernel, inner, call.number("filters")), _space(call))


def _transposed(call: LayerCall) -> Iterator[Matmul]:
    space, channels = call.image()
    yield Matmul("kernel", (*call.numbers("kernel_size", call.axes), call.number("filters"), channels), space)


def _depthwise(call: LayerCall) -> Iterator[Matmul]:
    _, channels = call.image()
    shape = (*call.numbers("kernel_size", call.axes), channels, call.number("depth_multiplier", 1))
    yield Matmul("depthwise_kernel", shape, _space(call))


def _separable(call: LayerCall) -> Iterator[Matmul]:
    yield from _depthwise(call)
    wide = scale_dim(call.image()[1], call.number("depth_multiplier", 1))
    yield Matmul("pointwise_kernel", (*(1,) * call.axes, wide, call.number("filters")), _space(call))


def _locally_connected(call: LayerCall) -> Iterator[Matmul]:
    _, channels = call.image()
    window = numel((*call.numbers("kernel_size", call.axes), channels))
    yield Matmul("kernel", (numel(_space(call)), window, call.number("filters")), ())


def _space(call: LayerCall) -> Shape:
    return call.image(WINDOW_RULES[call.kind](call))[0]


_MULTIPLYING: dict[str, Callable[[LayerCall], Iterator[Matmul]]] = {
    "Dense": _dense,
    **dict.fromkeys(("Conv1D", "Conv2D", "Conv3D"), _convolution),
    **dict.fromkeys(("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"), _transposed),
    **dict.fromkeys(("DepthwiseConv1D", "DepthwiseConv2D"), _depthwise),
    **dict.fromkeys(("SeparableConv1D", "SeparableConv2D"), _separable),
    **dict.fromkeys(("LocallyConnected1D", "LocallyConnected2D"), _locally_connected),
    **sequences.MATMULS,
}


MULTIPLIED = frozenset({Role.KERNEL, Role.RECURRENT})
_BY_LEAF, _BY_ROLE = 2, 1


class Weights:
    """The weights of a model, by the parts of their names: those of models, of layers and of the weight itself."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._parts: dict[str, tuple[str, ...]] = {}
        self._named: defaultdict[str, list[Tensor]] = defaultdict(list)
        self._known: dict[tuple[tuple[str, ...], tuple[str, ...], Matmul], tuple[Tensor, ...]] = {}
        for tensor in tensors:
            if tensor.role in MULTIPLIED:
                self._parts[tensor.name] = _parts(tensor)
                for part in dict.fromkeys(self._parts[tensor.name]):
                    self._named[part].append(tensor)

    def owns(self, names: Iterable[str]) -> bool:
        """Whether there are weights of a layer of one of these names."""
        return any(name in self._named for name in names)

    def of(
        self, names: tuple[str, ...], models: tuple[str, ...], product: Matmul, direction: int
    ) -> tuple[Tensor, ...]:
        """The weight of a product, or several if it is split by gates; empty if no weight matches.

        The weight's name must contain one of ``names``; the names of the models around decide between several weights.
        """
        key = (names, models, product)
        if key not in self._known:
            self._known[key] = self._best_matches(names, models, product)
        candidates = self._known[key]
        count = 1 if candidates and shapes_match(product.shape, candidates[0].shape) else product.gates
        if len(candidates) < count or not product.leaf:
            return ()
        begin = (product.position + direction) * count % len(candidates)
        return tuple(candidates[(begin + offset) % len(candidates)] for offset in range(count))

    def _best_matches(self, names: tuple[str, ...], models: tuple[str, ...], product: Matmul) -> tuple[Tensor, ...]:
        """All weights with the best score."""
        named_tensors = {
            tensor.name: tensor for name in names for tensor in self._named.get(name, ())[:MAX_LAYER_WEIGHTS]
        }
        shape = product.shape
        fitting = [tensor for tensor in named_tensors.values() if shapes_match(shape, tensor.shape)]
        if not fitting and product.gates > 1 and shape[-1] is not None:
            gate = (*shape[:-1], shape[-1] // product.gates)
            fitting = [tensor for tensor in named_tensors.values() if shapes_match(gate, tensor.shape)]
        scores = {tensor.name: self._score(tensor, names, models, product.leaf) for tensor in fitting}
        best = max(scores.values(), default=(0, 0, 0))
        return tuple(tensor for tensor in fitting if scores[tensor.name] == best and best[0])

    def _score(
        self, tensor: Tensor, names: tuple[str, ...], models: tuple[str, ...], leaf: str
    ) -> tuple[int, int, int]:
        parts = self._parts[tensor.name]
        inside, _, last = leaf.rpartition("/")
        is_recurrent = last == "recurrent_kernel"
        strength = 0
        if (tensor.role == Role.RECURRENT) == is_recurrent:
            strength = _BY_ROLE
        if parts[-1] == last and (not inside or any(inside in part for part in parts[:-1])):
            strength = _BY_LEAF
        explained = set(parts) & {*names, *models}
        return strength, len(explained), len(explained) - len(set(parts))


def shapes_match(expected: Shape, shape: tuple[int, ...]) -> bool:
    """Whether a tensor has a shape, but for the order of its axes and axes of length 1, in which Keras 1 differs."""
    if len(expected) == len(shape) and all(
        size in {None, length} for size, length in zip(expected, shape, strict=True)
    ):
        return True
    return None not in expected and Counter(size for size in expected if size != 1) == Counter(
        length for length in shape if length != 1
    )


def _parts(tensor: Tensor) -> tuple[str, ...]:
    """The names that a weight's name consists of, the last of them its own."""
    # Some layers have a slash in their name.
    joined_names = (tensor.layer, tensor.name.rpartition("/")[0])
    steps = [*joined_names, *tensor.layer.split("/"), *tensor.name.removesuffix(":0").split("/")]
    steps[-1] = modern_name(steps[-1]) if "/" not in tensor.name else steps[-1]
    return tuple(step.removeprefix(PRUNED_PREFIX) for step in steps)


Rule = Callable[[LayerCall], Shape]


def output(call: LayerCall) -> Shape | None:
    """The shape of a layer's output, if it is known."""
    rule = RULES.get(call.kind)
    try:
        return None if rule is None else validate_shape(rule(call))
    except UnknownShapeError:
        return None


def _elementwise(call: LayerCall) -> Shape:
    """The output shape of an elementwise TensorFlow function that Keras 2 recorded as a layer."""
    name = call.word("function") or call.word("op")
    if name.rpartition(".")[2].replace("_", "") not in _ELEMENTWISE:
        raise UnknownShapeError
    return broadcast(call.all_shapes)


def _merge_of_keras_1(call: LayerCall) -> Shape:
    mode = call.word("mode")
    if mode in {"sum", "mul", "ave", "max"}:
        return broadcast(call.all_shapes)
    if mode == "concat":
        return _concatenated(LayerCall(call.kind, {"axis": call.number("concat_axis", -1)}, call.inputs))
    raise UnknownShapeError


def _concatenated(call: LayerCall) -> Shape:
    shapes = call.all_shapes
    axis = _axis(call.number("axis", -1), len(shapes[0]))
    if len({len(shape) for shape in shapes}) != 1:
        raise UnknownShapeError
    lengths = [shape[axis] for shape in shapes]
    total = None if None in lengths else sum(length for length in lengths if length is not None)
    rest = broadcast(shapes)
    return (*rest[:axis], total, *rest[axis + 1 :])


def _axis(axis: int, rank: int) -> int:
    """An axis counted without the batch; Keras counts it with the batch."""
    position = axis + rank if axis < 0 else axis - 1
    if not 0 <= position < rank:
        raise UnknownShapeError
    return position


def _flat(call: LayerCall) -> Shape:
    shape = call.inputs[0] if call.inputs else None
    # The output has one axis even if the input shape is unknown.
    return (None if shape is None else numel(shape),)


def _reshaped(call: LayerCall) -> Shape:
    target = untuple(call.config.get("target_shape"))
    if not isinstance(target, list) or not all(type(length) is int for length in target) or target.count(-1) > 1:
        raise UnknownShapeError
    if -1 not in target:
        return tuple(target)
    size = numel(call.inputs[0]) if call.inputs and call.inputs[0] is not None else None
    known = numel(length for length in target if length != -1)
    missing: Length = size // known if size is not None and known else None
    return tuple(missing if length == -1 else length for length in target)


def _permuted(call: LayerCall) -> Shape:
    shape = call.shape()
    order = call.numbers("dims", len(shape))
    if sorted(order) != list(range(1, len(shape) + 1)):
        raise UnknownShapeError
    return tuple(shape[position - 1] for position in order)


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
    **dict.fromkeys(_SAME, lambda call: call.shape()),
    **dict.fromkeys(
        ("Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum"), lambda call: broadcast(call.all_shapes)
    ),
    **dict.fromkeys(("TFOpLambda", "TensorFlowOpLayer"), _elementwise),
    **WINDOW_RULES,
    **LOOKUP_RULES,
    **sequences.SHAPES,
    "Concatenate": _concatenated,
    "Dense": lambda call: (*call.shape()[:-1], call.number("units")),
    "Embedding": lambda call: (*call.shape(), call.number("output_dim")),
    "Flatten": _flat,
    "Merge": _merge_of_keras_1,
    "Permute": _permuted,
    "RepeatVector": lambda call: (call.number("n"), *call.shape()),
    "Reshape": _reshaped,
}
