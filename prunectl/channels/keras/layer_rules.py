"""Keras layers that make channels by weights, or scale them one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from prunectl.channels.graph import OpKind
from prunectl.channels.keras import layers
from prunectl.channels.keras.builder import Called, ObservedValue
from prunectl.channels.keras.layers import activated, is_steady
from prunectl.formats.keras.config import part, text, upgrade_class_name, upgrade_config
from prunectl.formats.keras.flops.matmuls import matmuls
from prunectl.formats.keras.flops.recurrent import GATES
from prunectl.formats.keras.flops.shapes import UnknownShapeError, untuple


def convolution(call: Called) -> str:
    """A convolution, plain or in groups; its kernel is (*space, in, out)."""
    _check(call)
    axes = call.step.axes
    groups = call.step.number("groups", 1)
    kernel = call.weight("kernel", (axes + 1, axes, *range(axes)))
    return _convolved(call, kernel, groups=groups, is_transposed=False)


def transposed(call: Called) -> str:
    """A transposed convolution; its kernel is (*space, out, in)."""
    _check(call)
    axes = call.step.axes
    kernel = call.weight("kernel", (axes + 1, axes, *range(axes)))
    return _convolved(call, kernel, groups=1, is_transposed=True)


def depthwise(call: Called) -> str:
    """A convolution channel by channel; its kernel is (*space, channels, multiplier)."""
    _check(call)
    channels = call.fronted(call.shape(call.data))[1]
    return _convolved(call, _by_channel(call), groups=channels, is_transposed=True)


def separable(call: Called) -> str:
    """A convolution channel by channel, and one that mixes the channels at each position."""
    _check(call)
    axes = call.step.axes
    made = call.fronted(call.made())
    data = call.forward(call.data)
    channels, wide = call.shape(data)[1], call.leaves["pointwise_kernel"].shape[-2]
    # By another name, as what each of the two reads and makes is told by their names.
    inner = replace(call, names=(*call.names, "depthwise")).does(
        OpKind.CONVOLUTION,
        (data, _by_channel(call)),
        (call.batch, wide, *made[2:]),
        groups=channels,
        is_transposed=True,
        is_padded=_is_padded(call),
    )
    kernel = call.weight("pointwise_kernel", (axes + 1, axes, *range(axes)))
    found = call.does(
        OpKind.CONVOLUTION, (inner, kernel, *_bias(call)), made, groups=1, is_transposed=False, is_padded=False
    )
    return activated(call, call.back(_seen(call, found)))


def dense(call: Called) -> str:
    """A matrix, (in, out), over the last axis."""
    _check(call)
    inputs = (call.data, call.weight("kernel", (0, 1)), *_bias(call))
    return activated(call, _seen(call, call.does(OpKind.LINEAR, inputs, call.made(), in_axis=0), is_image=False))


def embedding(call: Called) -> str:
    """A table of words."""
    table = call.leaves["embeddings"]
    made = call.made()
    if table.shape[1:] != made[-1:]:
        raise UnknownShapeError
    return call.does(OpKind.EMBEDDING, (call.weight("embeddings", (0, 1)), call.data), made)


def normalised(call: Called) -> str:
    """Batch normalisation, along one axis."""
    shape = call.shape(call.data)
    axis = _one_axis(call, len(shape))
    if any(tensor.shape != (shape[axis],) for tensor in call.leaves.values()) or not call.leaves:
        raise UnknownShapeError
    order = (0, axis, *(other for other in range(1, len(shape)) if other != axis))
    data = call.turned(call.data, order)
    leaves = ("gamma", "beta", "moving_mean", "moving_variance")
    inputs = (data, *(call.weight(leaf, (0,)) for leaf in leaves))
    made = call.does(OpKind.NORM, inputs, call.shape(data))
    return call.turned(made, tuple(order.index(place) for place in range(len(shape))))


def by_group(call: Called) -> str:
    """Normalisation over groups of channels, and over all positions; whole groups go."""
    shape = call.shape(call.data)
    axis, groups = _one_axis(call, len(shape)), call.step.number("groups", 32)
    channels = shape[axis]
    groups = channels if groups == -1 else groups
    if groups < 1 or channels % groups or any(tensor.shape != (channels,) for tensor in call.leaves.values()):
        raise UnknownShapeError
    last = (*(other for other in range(len(shape)) if other != axis), axis)
    data = call.turned(call.data, last)
    behind = call.shape(data)
    apart = call.does(OpKind.RESHAPE, (data,), (*behind[:-1], groups, channels // groups))
    apart = call.does(OpKind.STRETCH, (apart,), call.shape(apart), axes=(len(shape),))
    data = call.does(OpKind.RESHAPE, (apart,), behind)
    data = call.turned(data, (0, len(shape) - 1, *range(1, len(shape) - 1)))
    made = call.does(OpKind.NORM, (data, call.weight("gamma", (0,)), call.weight("beta", (0,))), call.shape(data))
    order = (0, axis, *(other for other in range(1, len(shape)) if other != axis))
    return call.turned(made, tuple(order.index(place) for place in range(len(shape))))


def sloped(call: Called) -> str:
    """A rectifier with slopes of its own; along shared axes they have length 1."""
    shape, slopes = call.shape(call.data), call.leaves["alpha"]
    if len(slopes.shape) != len(shape) - 1:
        raise UnknownShapeError
    return call.does(OpKind.EACH, (call.data, call.weight("alpha", range(len(slopes.shape)))), shape)


def scaled(call: Called) -> str:
    """A scale of its own for each channel of the last axis."""
    shape, scales = call.shape(call.data), call.leaves["gamma"]
    if scales.shape != shape[-1:]:
        raise UnknownShapeError
    return call.does(OpKind.EACH, (call.data, call.weight("gamma", (0,))), shape)


def _convolved(call: Called, kernel: str, *, groups: int, is_transposed: bool) -> str:
    shape = call.fronted(call.made())
    inputs = (call.forward(call.data), kernel, *_bias(call))
    found = call.does(
        OpKind.CONVOLUTION, inputs, shape, groups=groups, is_transposed=is_transposed, is_padded=_is_padded(call)
    )
    return activated(call, call.back(_seen(call, found)))


def _by_channel(call: Called) -> str:
    """Return a kernel of channel by channel as one of a transposed convolution in as many groups.

    Its first axis runs over what goes in, each of which makes as many as the multiplier says, one beside the other.
    """
    axes = call.step.axes
    return call.weight("depthwise_kernel", (axes, axes + 1, *range(axes)))


def _is_padded(call: Called) -> bool:
    return call.step.word("padding", "valid") != "valid"


def _bias(call: Called) -> tuple[str, ...]:
    return (call.weight("bias", (0,)),) if "bias" in call.leaves else ()


def _seen(call: Called, value: str, *, is_image: bool = True) -> str:
    """Remember where Keras has a value: of an image, with the channels where the layer has them."""
    order = tuple(range(len(call.shape(value))))
    if is_image and not call.step.is_channels_first:
        order = (0, order[-1], *order[1:-1])
    call.net.looks[value] = ObservedValue(call.names, order)
    return value


def _check(call: Called) -> None:
    """Hold the shapes of the weights against what the settings say."""
    found = matmuls(call.step)
    if any(one.leaf not in call.leaves or call.leaves[one.leaf].shape != one.shape for one in found):
        raise UnknownShapeError


def _one_axis(call: Called, rank: int) -> int:
    said = untuple(call.step.config.get("axis", -1))
    axes = said if isinstance(said, list) else [said]
    if len(axes) != 1 or type(axes[0]) is not int or not -rank < axes[0] < rank or not axes[0]:
        raise UnknownShapeError
    return int(axes[0]) % rank


RECURRENT_OPTIONS = frozenset({"initial_state"})
_STATES = {"LSTM": 2, "GRU": 1, "SimpleRNN": 1}
_REFUSED_RECURRENT = ("stateful", "time_major")
"""Settings under which a layer begins with what it was left with, or has its steps in front of its examples."""
_MERGED = ("sum", "mul", "ave")
_RANK = 3


def recurrent(call: Called) -> tuple[str, ...]:
    """A layer that goes through the steps in time."""
    return _direction(call, call.step.kind, call.step.config, "", call.inputs[1:])


def bidirectional(call: Called) -> tuple[str, ...]:
    """Two layers, of which the second goes through the steps from behind; the file may describe it or not."""
    config, begun = call.step.config, call.inputs[1:]
    forward = part(config, "layer")
    backward = part(config, "backward_layer") or forward
    ways = []
    for way, found, states in (
        ("forward", forward, begun[: len(begun) // 2]),
        ("backward", backward, begun[len(begun) // 2 :]),
    ):
        kind = upgrade_class_name(text(found, "class_name"))
        ways.append(_direction(call, kind, upgrade_config(kind, part(found, "config")), way, states))
    (first, *left), (second, *more) = ways
    shape, other = call.shape(first), call.shape(second)
    said = config.get("merge_mode", "concat")
    if said is None:
        return (first, second, *left, *more)
    if said == "concat":
        wide = (*shape[:-1], shape[-1] + other[-1])
        merged = call.does(OpKind.CONCAT, (first, second), wide, axis=len(shape) - 1)
    elif said in _MERGED and shape == other:
        merged = call.does(OpKind.EACH, (first, second), shape)
    else:
        raise UnknownShapeError
    return (merged, *left, *more)


def _direction(
    call: Called, kind: str, config: Mapping[str, Any], way: str, states: tuple[str, ...]
) -> tuple[str, ...]:
    """Put in a layer in one direction, and return what it gives."""
    if kind not in GATES or any(config.get(key) for key in _REFUSED_RECURRENT) or not is_steady(config):
        raise UnknownShapeError
    front = f"{way}/" if way else ""
    inner, data = call.leaves[f"{front}recurrent_kernel"], call.shape(call.inputs[0])
    units, gates = inner.shape[0], GATES[kind]
    bias = call.leaves.get(f"{front}bias")
    if (
        len(data) != _RANK
        or call.leaves[f"{front}kernel"].shape != (data[-1], gates * units)
        or inner.shape != (units, gates * units)
        or (bias is not None and bias.shape not in {(gates * units,), (2, gates * units), (2 * gates * units,)})
        or [call.shape(state) for state in states] not in ([], [(data[0], units)] * _STATES[kind])
    ):
        raise UnknownShapeError
    inputs = (
        call.inputs[0],
        call.weight(f"{front}kernel", (1, 0)),
        call.weight(f"{front}recurrent_kernel", (1, 0)),
        "" if bias is None else call.weight(f"{front}bias", range(len(bias.shape))),
        *states,
    )
    out = (*data[:-1], units) if config.get("return_sequences") else (data[0], units)
    more = ((data[0], units),) * (_STATES[kind] if config.get("return_state") else 0)
    name = f"{call.name}/{way}" if way else call.name
    return call.net.add(name, kind, OpKind.RECURRENT, inputs, (out, *more), units=units, gates=gates)


ATTENTION_OPTIONS = frozenset({"query", "value", "key", "attention_mask", "query_mask", "value_mask", "key_mask"})
_THREE = ("query", "value", "key")
_REFUSED_ATTENTION = ("use_gate", "flash_attention", "sliding_window")
"""Settings that put more between the projections than heads that do not know of one another."""
_KERNEL = 3


def in_order(inputs: Sequence[str], words: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what an attention takes with query, value and key in front, in this order."""
    count = len(inputs) - len(words)
    named = dict(zip(words, inputs[count:], strict=True))
    if len(named) != len(words):
        return tuple(inputs), tuple(words)
    given = {**dict(zip(_THREE, inputs[:count], strict=False)), **named}
    front = [given.pop(word) for word in _THREE if word in given]
    return (*front, *inputs[len(_THREE) : count], *given.values()), tuple(given)


def multi_head_attention(call: Called) -> str:
    """Projections, heads, and a projection of what they found."""
    count = len(call.inputs) - len(call.words)
    if count not in {2, 3} or any(call.step.config.get(key) for key in _REFUSED_ATTENTION):
        raise UnknownShapeError
    query, value, key = (*call.inputs[:count], call.inputs[1])[:3]
    shapes = {one: call.leaves[f"{one}/kernel"].shape for one in ("query", "key", "value", "output")}
    heads, out = call.step.number("num_heads"), shapes["output"][-1]
    for one, data in (("query", query), ("key", key), ("value", value)):
        if shapes[one][:2] != (call.shape(data)[-1], heads) or len(shapes[one]) != _KERNEL:
            raise UnknownShapeError
    if shapes["output"] != (heads, shapes["value"][-1], out) or shapes["query"][-1] != shapes["key"][-1]:
        raise UnknownShapeError
    order = ("query", "value", "key", "output")
    kernels = [call.weight(f"{one}/kernel", range(_KERNEL)) for one in order]
    biases = [call.weight(f"{one}/bias", (0,) if one == "output" else (0, 1)) for one in order]
    masks = call.inputs[count:]
    return call.does(OpKind.HEADS, (query, value, key, *kernels, *biases, *masks), (*call.shape(query)[:-1], out))


FUNCTION = "function"
"""The row of what is no layer."""
LayerRule = Callable[[Called], str | tuple[str, ...]]


def _activation(call: Called) -> str:
    return activated(call, call.data)


_ALONE = (
    *("ReLU", "LeakyReLU", "ELU", "ThresholdedReLU", "Dropout", "GaussianNoise", "GaussianDropout", "AlphaDropout"),
    *("SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D", "ActivityRegularization", "Identity"),
    *("RandomContrast", "RandomBrightness"),
)
_SPATIAL = (
    *(f"{kind}Pooling{axes}D" for kind in ("Max", "Average", "GlobalMax", "GlobalAverage") for axes in (1, 2, 3)),
    *(f"{kind}{axes}D" for kind in ("ZeroPadding", "Cropping", "UpSampling") for axes in (1, 2, 3)),
    *("Resizing", "CenterCrop"),
)
KINDS: Mapping[str, LayerRule] = {
    **dict.fromkeys(("Conv1D", "Conv2D", "Conv3D"), convolution),
    **dict.fromkeys(("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"), transposed),
    **dict.fromkeys(("DepthwiseConv1D", "DepthwiseConv2D"), depthwise),
    **dict.fromkeys(("SeparableConv1D", "SeparableConv2D"), separable),
    "Dense": dense,
    "Embedding": embedding,
    **dict.fromkeys(("BatchNormalization", "SyncBatchNormalization"), normalised),
    "GroupNormalization": by_group,
    **dict.fromkeys(GATES, recurrent),
    "Bidirectional": bidirectional,
    "MultiHeadAttention": multi_head_attention,
    "PReLU": sloped,
    **dict.fromkeys(("Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum"), layers.together),
    "Concatenate": layers.concatenated,
    **dict.fromkeys(_ALONE, layers.alone),
    "Rescaling": layers.rescaled,
    "Activation": _activation,
    **dict.fromkeys(
        ("Softmax", "Masking", "LayerNormalization", "UnitNormalization", "RMSNormalization"), layers.normal
    ),
    **dict.fromkeys(_SPATIAL, layers.spatial),
    "Flatten": layers.flat,
    "Reshape": layers.reshaped,
    "Permute": layers.permuted,
    "RepeatVector": layers.repeated,
    FUNCTION: layers.function,
}


WORDS: Mapping[str, frozenset[str]] = {
    **dict.fromkeys((*GATES, "Bidirectional"), RECURRENT_OPTIONS),
    "MultiHeadAttention": ATTENTION_OPTIONS,
}
"""What layers can be given by name."""
_OWN_MODULES = ("keras", "tf_keras", "tensorflow")
_OF_APPLICATIONS: Mapping[str, LayerRule] = {
    "LayerScale": scaled,
    "StochasticDepth": layers.alone,
    "CustomScaleLayer": layers.alike,
}
"""Layers that come with the architectures of Keras: a scale for each channel, a sum with a share of another."""


def rule_for(found: Mapping[str, Any], kind: str) -> LayerRule | None:
    """Return what a layer does, unless it is somebody's own class, whatever its name is."""
    module = text(found, "module")
    is_own = module.split(".")[0] in _OWN_MODULES if module else ">" not in text(found, "registered_name")
    if not is_own:
        return None
    return _OF_APPLICATIONS.get(kind) if ".applications." in module else KINDS.get(kind)
