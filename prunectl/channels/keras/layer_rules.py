"""The rules for Keras layers: their operations in the graph, and how they are resized; see also `layers.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from prunectl.channels.adapter import PrunedShapes
from prunectl.channels.graph import OpKind
from prunectl.channels.keras import layers
from prunectl.channels.keras.builder import CalledLayer, LayerContext, ObservedValue
from prunectl.channels.keras.layers import apply_activation, has_known_activations
from prunectl.formats.keras.config import object_in, string_in, untuple, upgrade_class_name, upgrade_config
from prunectl.formats.keras.flops.matmuls import matmuls
from prunectl.formats.keras.flops.sequences import CONV_LSTM, GATES, STATES
from prunectl.formats.keras.flops.shapes import UnknownShapeError


def _convolution(call: LayerContext, *, is_transposed: bool = False) -> str:
    """A convolution, plain or in groups, with a kernel (*space, in, out); a transposed one has (*space, out, in)."""
    _check_shapes(call)
    axes = call.layer.axes
    groups = 1 if is_transposed else call.layer.number("groups", 1)
    kernel = call.weight_view("kernel", (axes + 1, axes, *range(axes)))
    return _emit_convolution(call, kernel, groups=groups, is_transposed=is_transposed)


def _depthwise(call: LayerContext) -> str:
    """A depthwise convolution; its kernel is (*space, channels, multiplier)."""
    _check_shapes(call)
    channels = call.channels_first_shape(call.shape(call.data))[1]
    return _emit_convolution(call, _depthwise_kernel(call), groups=channels, is_transposed=True)


def _separable(call: LayerContext) -> str:
    """A depthwise convolution followed by a pointwise one."""
    _check_shapes(call)
    axes = call.layer.axes
    shape = call.channels_first_shape(call.output_shape())
    data = call.to_channels_first(call.data)
    channels, width = call.shape(data)[1], call.weights["pointwise_kernel"].shape[-2]
    # Under a name of its own, as the axes that an operation reads are looked up by its name.
    depthwise_output = replace(call, names=(*call.names, "depthwise")).emit(
        OpKind.CONVOLUTION,
        (data, _depthwise_kernel(call)),
        (call.batch, width, *shape[2:]),
        groups=channels,
        is_transposed=True,
    )
    kernel = call.weight_view("pointwise_kernel", (axes + 1, axes, *range(axes)))
    pointwise = call.emit(
        OpKind.CONVOLUTION,
        (depthwise_output, kernel, *_bias_inputs(call)),
        shape,
        groups=1,
        is_transposed=False,
    )
    return apply_activation(call, call.from_channels_first(_observe(call, pointwise)))


def _dense(call: LayerContext) -> str:
    """A dense layer over the last axis; its kernel is (in, out)."""
    _check_shapes(call)
    inputs = (call.data, call.weight_view("kernel", (0, 1)), *_bias_inputs(call))
    return apply_activation(
        call, _observe(call, call.emit(OpKind.LINEAR, inputs, call.output_shape(), in_axis=0), is_image=False)
    )


def _embedding(call: LayerContext) -> str:
    table = call.weights["embeddings"]
    shape = call.output_shape()
    if table.shape[1:] != shape[-1:]:
        raise UnknownShapeError
    return call.emit(OpKind.EMBEDDING, (call.weight_view("embeddings", (0, 1)), call.data), shape)


def _batch_norm(call: LayerContext) -> str:
    """Batch normalisation, along one axis."""
    shape = call.shape(call.data)
    axis = _single_axis(call, len(shape))
    if any(tensor.shape != (shape[axis],) for tensor in call.weights.values()) or not call.weights:
        raise UnknownShapeError
    order = (0, axis, *(other for other in range(1, len(shape)) if other != axis))
    data = call.transpose(call.data, order)
    leaves = ("gamma", "beta", "moving_mean", "moving_variance")
    inputs = (data, *(call.weight_view(leaf, (0,)) for leaf in leaves))
    normalized = call.emit(OpKind.CHANNEL_NORM, inputs, call.shape(data))
    return call.transpose(normalized, tuple(order.index(position) for position in range(len(shape))))


def _group_norm(call: LayerContext) -> str:
    """Normalisation over groups of channels and all positions; only whole groups can be removed."""
    shape = call.shape(call.data)
    axis, groups = _single_axis(call, len(shape)), call.layer.number("groups", 32)
    channels = shape[axis]
    groups = channels if groups == -1 else groups
    if groups < 1 or channels % groups or any(tensor.shape != (channels,) for tensor in call.weights.values()):
        raise UnknownShapeError
    channels_last = (*(other for other in range(len(shape)) if other != axis), axis)
    data = call.transpose(call.data, channels_last)
    full_shape = call.shape(data)
    blocks = call.emit(OpKind.RESHAPE, (data,), (*full_shape[:-1], groups, channels // groups))
    blocks = call.emit(OpKind.ALONG_AXES, (blocks,), call.shape(blocks), axes=(len(shape),))
    data = call.emit(OpKind.RESHAPE, (blocks,), full_shape)
    data = call.transpose(data, (0, len(shape) - 1, *range(1, len(shape) - 1)))
    normalized = call.emit(
        OpKind.CHANNEL_NORM, (data, call.weight_view("gamma", (0,)), call.weight_view("beta", (0,))), call.shape(data)
    )
    order = (0, axis, *(other for other in range(1, len(shape)) if other != axis))
    return call.transpose(normalized, tuple(order.index(position) for position in range(len(shape))))


def _prelu(call: LayerContext) -> str:
    """A leaky ReLU with trained slopes, which have length 1 along shared axes."""
    shape, slopes = call.shape(call.data), call.weights["alpha"]
    if len(slopes.shape) != len(shape) - 1:
        raise UnknownShapeError
    return call.emit(OpKind.ELEMENTWISE, (call.data, call.weight_view("alpha", range(len(slopes.shape)))), shape)


def _layer_scale(call: LayerContext) -> str:
    """A trained scale for each channel of the last axis."""
    shape, scales = call.shape(call.data), call.weights["gamma"]
    if scales.shape != shape[-1:]:
        raise UnknownShapeError
    return call.emit(OpKind.ELEMENTWISE, (call.data, call.weight_view("gamma", (0,))), shape)


def _emit_convolution(call: LayerContext, kernel: str, *, groups: int, is_transposed: bool) -> str:
    shape = call.channels_first_shape(call.output_shape())
    inputs = (call.to_channels_first(call.data), kernel, *_bias_inputs(call))
    convolved = call.emit(OpKind.CONVOLUTION, inputs, shape, groups=groups, is_transposed=is_transposed)
    return apply_activation(call, call.from_channels_first(_observe(call, convolved)))


def _depthwise_kernel(call: LayerContext) -> str:
    """A depthwise kernel as that of a transposed convolution with one group for each input channel.

    Axis 0 counts the input channels, axis 1 the output channels of each, of which there are `depth_multiplier`.
    """
    axes = call.layer.axes
    return call.weight_view("depthwise_kernel", (axes, axes + 1, *range(axes)))


def _bias_inputs(call: LayerContext) -> tuple[str, ...]:
    return (call.weight_view("bias", (0,)),) if "bias" in call.weights else ()


def _observe(call: LayerContext, value: str, *, is_image: bool = True) -> str:
    """Note that a value can be recorded in Keras; an image has its channels on the axis of the layer's data format."""
    order = tuple(range(len(call.shape(value))))
    if is_image and not call.layer.is_channels_first:
        order = (0, order[-1], *order[1:-1])
    call.builder.observed[value] = ObservedValue(call.names, order)
    return value


def _check_shapes(call: LayerContext) -> None:
    """UnknownShapeError if the shapes of the weights do not fit the settings of the layer."""
    expected = matmuls(call.layer)
    if any(matmul.leaf not in call.weights or call.weights[matmul.leaf].shape != matmul.shape for matmul in expected):
        raise UnknownShapeError


def _single_axis(call: LayerContext, rank: int) -> int:
    axis = untuple(call.layer.config.get("axis", -1))
    axes = axis if isinstance(axis, list) else [axis]
    if len(axes) != 1 or type(axes[0]) is not int or not -rank < axes[0] < rank or not axes[0]:
        raise UnknownShapeError
    return int(axes[0]) % rank


_INITIAL_STATE = frozenset({"initial_state"})
_REFUSED_RECURRENT = ("stateful", "time_major")
"""Settings that are not supported: states kept from batch to batch, and time on axis 0."""
_MERGED = ("sum", "mul", "ave")
_RANK = 3


def _recurrent(call: LayerContext) -> tuple[str, ...]:
    return _direction(call, call.layer.kind, call.layer.config, "", call.inputs[1:])


def _bidirectional(call: LayerContext) -> tuple[str, ...]:
    """A forward and a backward layer; if the file does not describe the backward layer, it is like the forward one."""
    config, initial_states = call.layer.config, call.inputs[1:]
    forward = object_in(config, "layer")
    backward = object_in(config, "backward_layer") or forward
    directions = []
    for direction, layer, states in (
        ("forward", forward, initial_states[: len(initial_states) // 2]),
        ("backward", backward, initial_states[len(initial_states) // 2 :]),
    ):
        kind = upgrade_class_name(string_in(layer, "class_name"))
        directions.append(_direction(call, kind, upgrade_config(kind, object_in(layer, "config")), direction, states))
    (first, *forward_states), (second, *backward_states) = directions
    shape, other = call.shape(first), call.shape(second)
    merge_mode = config.get("merge_mode", "concat")
    if merge_mode is None:
        return (first, second, *forward_states, *backward_states)
    if merge_mode == "concat":
        wide = (*shape[:-1], shape[-1] + other[-1])
        merged = call.emit(OpKind.CONCAT, (first, second), wide, axis=len(shape) - 1)
    elif merge_mode in _MERGED and shape == other:
        merged = call.emit(OpKind.ELEMENTWISE, (first, second), shape)
    else:
        raise UnknownShapeError
    return (merged, *forward_states, *backward_states)


def _direction(
    call: LayerContext, kind: str, config: Mapping[str, Any], direction: str, states: tuple[str, ...]
) -> tuple[str, ...]:
    """Emit a recurrent layer in one direction, and return its outputs."""
    if kind not in GATES or any(config.get(key) for key in _REFUSED_RECURRENT) or not has_known_activations(config):
        raise UnknownShapeError
    prefix = f"{direction}/" if direction else ""
    recurrent_kernel, data = call.weights[f"{prefix}recurrent_kernel"], call.shape(call.inputs[0])
    units, gates = recurrent_kernel.shape[0], GATES[kind]
    bias = call.weights.get(f"{prefix}bias")
    if (
        len(data) != _RANK
        or call.weights[f"{prefix}kernel"].shape != (data[-1], gates * units)
        or recurrent_kernel.shape != (units, gates * units)
        or (bias is not None and bias.shape not in {(gates * units,), (2, gates * units), (2 * gates * units,)})
        or [call.shape(state) for state in states] not in ([], [(data[0], units)] * STATES[kind])
    ):
        raise UnknownShapeError
    inputs = (
        call.inputs[0],
        call.weight_view(f"{prefix}kernel", (1, 0)),
        call.weight_view(f"{prefix}recurrent_kernel", (1, 0)),
        "" if bias is None else call.weight_view(f"{prefix}bias", range(len(bias.shape))),
        *states,
    )
    output = (*data[:-1], units) if config.get("return_sequences") else (data[0], units)
    more = ((data[0], units),) * (STATES[kind] if config.get("return_state") else 0)
    name = f"{call.name}/{direction}" if direction else call.name
    return call.builder.add(name, kind, OpKind.RECURRENT, inputs, (output, *more), units=units, gates=gates)


def _conv_lstm(call: LayerContext) -> tuple[str, ...]:
    """An LSTM whose products are convolutions; its kernels are (*space, in, gates * units)."""
    _check_shapes(call)
    config, axes, (data, *states), shape = call.layer.config, call.layer.axes, call.inputs, call.output_shape()
    state = (call.batch, *shape[-1 - axes :])
    is_refused = call.layer.is_channels_first or any(config.get(key) for key in _REFUSED_RECURRENT)
    if is_refused or not has_known_activations(config) or any(call.shape(name) != state for name in states):
        raise UnknownShapeError
    kernels = [call.weight_view(leaf, (*range(axes), axes + 1, axes)) for leaf in ("kernel", "recurrent_kernel")]
    inputs = (data, *kernels, call.weight_view("bias", (0,)), *states)
    facts = {"units": state[-1], "gates": 4, "positions": math.prod((*call.shape(data)[:2], *state[1:-1]))}
    shapes = (shape, *[state] * (2 if config.get("return_state") else 0))
    return call.builder.add(call.name, call.op, OpKind.RECURRENT, inputs, shapes, **facts)


_ATTENTION_INPUTS = frozenset({"query", "value", "key", "attention_mask", "query_mask", "value_mask", "key_mask"})
_QUERY_VALUE_KEY = ("query", "value", "key")
_REFUSED_ATTENTION = ("use_gate", "flash_attention", "sliding_window")
"""Settings that are not supported, as they compute more between the projections than independent heads."""
_KERNEL = 3


def query_value_key_first(inputs: Sequence[str], keywords: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The inputs of an attention with query, value and key first, and the names of its other keyword arguments."""
    count = len(inputs) - len(keywords)
    by_keyword = dict(zip(keywords, inputs[count:], strict=True))
    if len(by_keyword) != len(keywords):
        return tuple(inputs), tuple(keywords)
    arguments = {**dict(zip(_QUERY_VALUE_KEY, inputs[:count], strict=False)), **by_keyword}
    leading = [arguments.pop(word) for word in _QUERY_VALUE_KEY if word in arguments]
    return (*leading, *inputs[len(_QUERY_VALUE_KEY) : count], *arguments.values()), tuple(arguments)


def _multi_head_attention(call: LayerContext) -> str:
    """Multi-head attention, as one operation with its input projections and its output projection."""
    count = len(call.inputs) - len(call.keywords)
    if count not in {2, 3} or any(call.layer.config.get(key) for key in _REFUSED_ATTENTION):
        raise UnknownShapeError
    query, value, key = (*call.inputs[:count], call.inputs[1])[:3]
    shapes = {
        projection: call.weights[f"{projection}/kernel"].shape for projection in ("query", "key", "value", "output")
    }
    heads, out = call.layer.number("num_heads"), shapes["output"][-1]
    for projection, data in (("query", query), ("key", key), ("value", value)):
        if shapes[projection][:2] != (call.shape(data)[-1], heads) or len(shapes[projection]) != _KERNEL:
            raise UnknownShapeError
    if shapes["output"] != (heads, shapes["value"][-1], out) or shapes["query"][-1] != shapes["key"][-1]:
        raise UnknownShapeError
    order = ("query", "value", "key", "output")
    kernels = [call.weight_view(f"{projection}/kernel", range(_KERNEL)) for projection in order]
    biases = [
        call.weight_view(f"{projection}/bias", (0,) if projection == "output" else (0, 1)) for projection in order
    ]
    masks = call.inputs[count:]
    return call.emit(OpKind.ATTENTION, (query, value, key, *kernels, *biases, *masks), (*call.shape(query)[:-1], out))


@dataclass(frozen=True, slots=True)
class LayerResize:
    """A layer whose settings are updated after the removal of channels."""

    call: CalledLayer
    settings: dict[str, Any]
    """The settings in the smaller network, which are changed in place."""
    original: Mapping[str, Any]
    """The settings before the removal."""
    shapes: Mapping[str, tuple[int, ...]]
    """The shape of each weight after the removal."""
    after: PrunedShapes

    def has_changed(self, leaf: str) -> bool:
        """Whether the layer has a weight of this name that became smaller."""
        return leaf in self.shapes and self.shapes[leaf] != self.call.weights[leaf].shape


def _resize_conv_groups(layer: LayerResize) -> None:
    """Set the groups of a depthwise Conv layer to the number of its input channels."""
    groups, data = layer.settings.get("groups", 1), layer.call.inputs[0]
    axis = 1 if layer.settings.get("data_format") == "channels_first" else -1
    if layer.has_changed("kernel") and 1 < groups == layer.after.trace.shape(data)[axis]:
        layer.settings["groups"] = layer.after.shape(data)[axis]


def _resize_norm_groups(layer: LayerResize) -> None:
    """Reduce the number of groups so that each has as many channels as before."""
    axis, groups = untuple(layer.original.get("axis", -1)), layer.original.get("groups", 32)
    axis, data = axis[0] if isinstance(axis, list) else axis, layer.call.inputs[0]
    if layer.after.has_changed(data):
        channels, channels_before = layer.after.shape(data)[axis], layer.after.trace.shape(data)[axis]
        layer.settings["groups"] = groups if groups == -1 else channels * groups // channels_before


def _resize_target(layer: LayerResize) -> None:
    value, target = layer.call.outputs[0], untuple(layer.settings["target_shape"])
    if not layer.after.has_changed(value):
        return
    pairs = zip(layer.after.trace.shape(value)[1:], layer.after.shape(value)[1:], strict=True)
    for axis, (old, new) in enumerate(pairs):
        if target[axis] != -1 and old != new:
            target[axis] = new


def _resize_attention(layer: LayerResize) -> None:
    """Set `output_shape`, which defaults to the channels of the query, to the new number of output channels."""
    channels = layer.shapes["output/kernel"][-1] if "output/kernel" in layer.shapes else 0
    is_explicit = layer.settings.get("output_shape") is not None
    if channels and any(map(layer.has_changed, layer.shapes)):
        if is_explicit or channels != layer.after.shape(layer.call.inputs[0])[-1]:
            layer.settings["output_shape"] = [channels]


def _resize_directions(layer: LayerResize) -> None:
    for direction, key in (("forward", "layer"), ("backward", "backward_layer")):
        kernel, inner = f"{direction}/recurrent_kernel", layer.settings.get(key)
        if layer.has_changed(kernel) and inner is not None:
            inner["config"]["units"] = layer.shapes[kernel][0]


@dataclass(frozen=True, slots=True)
class LayerRule:
    """The operations that a layer becomes, and how its settings are updated after the removal of channels."""

    lower: Callable[[LayerContext], str | tuple[str, ...]]
    lengths: tuple[tuple[str, str, int], ...] = ()
    """The settings that are lengths of weight axes: the setting, the weight, the axis."""
    resize: Callable[[LayerResize], None] | None = None
    keywords: frozenset[str] = frozenset()
    """The keyword arguments that its call may have."""


FUNCTION = "function"
"""The row for functions, which are not layers."""


_ELEMENTWISE = (
    *("ReLU", "LeakyReLU", "ELU", "ThresholdedReLU", "Dropout", "GaussianNoise", "GaussianDropout", "AlphaDropout"),
    *("SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D", "ActivityRegularization", "Identity"),
    *("RandomContrast", "RandomBrightness"),
)
_MULTIPLIER = ("depth_multiplier", "depthwise_kernel", -1)
_SPATIAL = (
    *(f"{kind}Pooling{axes}D" for kind in ("Max", "Average", "GlobalMax", "GlobalAverage") for axes in (1, 2, 3)),
    *(f"{kind}{axes}D" for kind in ("ZeroPadding", "Cropping", "UpSampling") for axes in (1, 2, 3)),
    *("Resizing", "CenterCrop"),
)
RULES: Mapping[str, LayerRule] = {
    **dict.fromkeys(
        ("Conv1D", "Conv2D", "Conv3D"), LayerRule(_convolution, (("filters", "kernel", -1),), _resize_conv_groups)
    ),
    **dict.fromkeys(
        ("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"),
        LayerRule(partial(_convolution, is_transposed=True), (("filters", "kernel", -2),)),
    ),
    **dict.fromkeys(("DepthwiseConv1D", "DepthwiseConv2D"), LayerRule(_depthwise, (_MULTIPLIER,))),
    **dict.fromkeys(
        ("SeparableConv1D", "SeparableConv2D"),
        LayerRule(_separable, (("filters", "pointwise_kernel", -1), _MULTIPLIER)),
    ),
    "Dense": LayerRule(_dense, (("units", "kernel", -1),)),
    "Embedding": LayerRule(_embedding, (("output_dim", "embeddings", -1),)),
    **dict.fromkeys(("BatchNormalization", "SyncBatchNormalization"), LayerRule(_batch_norm)),
    "GroupNormalization": LayerRule(_group_norm, resize=_resize_norm_groups),
    **dict.fromkeys(GATES, LayerRule(_recurrent, (("units", "recurrent_kernel", 0),), keywords=_INITIAL_STATE)),
    **dict.fromkeys(CONV_LSTM, LayerRule(_conv_lstm, (("filters", "recurrent_kernel", -2),), keywords=_INITIAL_STATE)),
    "Bidirectional": LayerRule(_bidirectional, resize=_resize_directions, keywords=_INITIAL_STATE),
    "MultiHeadAttention": LayerRule(
        _multi_head_attention, (("num_heads", "query/kernel", 1),), _resize_attention, _ATTENTION_INPUTS
    ),
    "PReLU": LayerRule(_prelu),
    **dict.fromkeys(("Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum"), LayerRule(layers.merge)),
    "Concatenate": LayerRule(layers.concatenate),
    **dict.fromkeys(_ELEMENTWISE, LayerRule(layers.elementwise)),
    "Rescaling": LayerRule(layers.rescale),
    "Activation": LayerRule(lambda call: apply_activation(call, call.data)),
    **dict.fromkeys(
        ("Softmax", "Masking", "LayerNormalization", "UnitNormalization", "RMSNormalization"),
        LayerRule(layers.normalize),
    ),
    **dict.fromkeys(_SPATIAL, LayerRule(layers.pool_or_pad)),
    "Flatten": LayerRule(layers.flatten),
    "Reshape": LayerRule(layers.reshape, resize=_resize_target),
    "Permute": LayerRule(layers.permute),
    "RepeatVector": LayerRule(layers.repeat),
    FUNCTION: LayerRule(layers.function),
}


_KERAS_MODULES = ("keras", "tf_keras", "tensorflow")
_APPLICATION_RULES: Mapping[str, LayerRule] = {
    "LayerScale": LayerRule(_layer_scale, (("projection_dim", "gamma", 0),)),
    "StochasticDepth": LayerRule(layers.elementwise),
    "CustomScaleLayer": LayerRule(layers.merge_same_shape),
}
"""The layers of keras.applications: a scale for each channel, stochastic depth, a sum with a scaled residual."""


def rule_for(layer: Mapping[str, Any], kind: str) -> LayerRule | None:
    """The rule for a layer; None for a class of the user, even if it has the name of a Keras class."""
    module = string_in(layer, "module")
    is_builtin = module.split(".")[0] in _KERAS_MODULES if module else ">" not in string_in(layer, "registered_name")
    if not is_builtin:
        return None
    by_module = _APPLICATION_RULES if ".applications." in module else RULES
    # HDF5 files name no modules: a user's class of the same name is found by the equivalence check if it differs.
    return by_module.get(kind) or (None if module else _APPLICATION_RULES.get(kind.removeprefix("Custom>")))
