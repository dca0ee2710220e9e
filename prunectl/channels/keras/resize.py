"""A Keras configuration without some channels: what names their number, set right."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from prunectl.channels.adapter import PrunedShapes
from prunectl.channels.keras.builder import CalledLayer, GraphBuilder
from prunectl.channels.keras.weights import ConfigPath, get_at
from prunectl.formats.keras.config import part, text, upgrade_class_name
from prunectl.formats.keras.flops.recurrent import GATES
from prunectl.formats.keras.flops.shapes import untuple


def update_build_config(layer: dict[str, Any], layer_call: CalledLayer, after: PrunedShapes) -> None:
    """Set right what Keras says that a layer was built for: shapes in the order of what goes in, or by its names."""
    build_config = layer.get("build_config")
    shapes_by_name = part(build_config, "shapes_dict")
    if "query_shape" in shapes_by_name:
        update_qkv(shapes_by_name, layer_call, after)
        return
    values = iter(layer_call.inputs)
    for shape in shapes_in(build_config):
        update_shape(shape, next(values, ""), after)


def update_qkv(shapes_by_name: Mapping[str, Any], layer_call: CalledLayer, after: PrunedShapes) -> None:
    """Set right the shapes of query, value and key."""
    inputs = (*layer_call.inputs, layer_call.inputs[-1])[:3]
    for name, value in zip(("query", "value", "key"), inputs, strict=False):
        for shape in shapes_in(shapes_by_name.get(f"{name}_shape")):
            update_shape(shape, value, after)


def shapes_in(value: Any) -> Iterator[list[Any]]:
    """Yield the shapes in what Keras says a layer was built for, in their order."""
    unwrapped = untuple(value)
    if isinstance(unwrapped, list):
        if unwrapped and all(length is None or type(length) is int for length in unwrapped):
            yield unwrapped
        else:
            for item in unwrapped:
                yield from shapes_in(item)
    elif isinstance(unwrapped, dict):
        for item in unwrapped.values():
            yield from shapes_in(item)


def update_shape(shape: list[Any], value: str, after: PrunedShapes) -> None:
    """Set the lengths right that a value no longer has."""
    if not after.has_changed(value):
        return
    old, new = after.trace.shape(value), after.shape(value)
    if len(shape) != len(old):
        return
    for axis, pair in enumerate(zip(old, new, strict=True)):
        if pair[0] != pair[1] and shape[axis] is not None:
            shape[axis] = pair[1]


def update_tensors(nodes: Any, values: Mapping[tuple[str, int, int], str], after: PrunedShapes) -> None:
    """Set right what Keras 3 says of the shapes of values where a layer takes them: a layer, a call, an output."""
    if isinstance(nodes, list):
        for node in nodes:
            update_tensors(node, values, after)
    elif isinstance(nodes, dict):
        config = part(nodes, "config")
        history, shape = config.get("keras_history"), config.get("shape")
        if isinstance(history, list) and isinstance(shape, list):
            update_shape(shape, values.get(tuple(history), ""), after)
        else:
            for node in nodes.values():
                update_tensors(node, values, after)


Shapes = Mapping[str, tuple[int, ...]]
"""Of what is left of each weight."""
_SHAPE_KEYS = ("batch_input_shape", "batch_shape", "build_input_shape", "input_shape")
_KERAS1_NAMES = {"filters": "nb_filter", "units": "output_dim"}
"""What Keras 1 called a setting."""


def resize_config(
    config: Mapping[str, Any], builder: GraphBuilder, after: PrunedShapes, left: Shapes
) -> dict[str, Any]:
    """The configuration of the smaller network."""
    resized: dict[str, Any] = copy.deepcopy(dict(config))
    for layer_call in builder.called:
        layer = get_at(resized, layer_call.path)
        _resize(layer, layer_call, after, left)
        if upgrade_class_name(text(layer, "class_name")) == "GroupNormalization" and after.has_changed(
            layer_call.inputs[0]
        ):
            layer["config"]["groups"] = _norm_groups(get_at(config, layer_call.path)["config"], layer_call, after)
        update_build_config(layer, layer_call, after)
        for key in _SHAPE_KEYS:
            for shape in shapes_in(part(layer, "config").get(key)):
                update_shape(shape, layer_call.inputs[0] if layer_call.inputs else "", after)
    values: dict[ConfigPath, dict[tuple[str, int, int], str]] = {}
    for (spot, name, node, tensor), value in builder.references.items():
        if after.has_changed(value):
            values.setdefault(spot, {})[name, node, tensor] = value
    for spot, changed in values.items():
        for layer in get_at(resized, spot)["config"]["layers"]:
            update_tensors(layer.get("inbound_nodes"), changed, after)
    return resized


def _resize(layer: dict[str, Any], layer_call: CalledLayer, after: PrunedShapes, pruned_shapes: Shapes) -> None:
    """Set the numbers of channels of a layer."""
    kind = upgrade_class_name(text(layer, "class_name"))
    shapes = {leaf: pruned_shapes.get(tensor.name, tensor.shape) for leaf, tensor in layer_call.weights.items()}
    settings = layer["config"]
    changed = {leaf for leaf, tensor in layer_call.weights.items() if shapes[leaf] != tensor.shape}
    for key, leaf, axis in _SIZE_SETTINGS.get(kind, ()):
        if leaf in changed:
            settings[key if key in settings else _KERAS1_NAMES.get(key, key)] = shapes[leaf][axis]
    if "kernel" in changed and settings.get("groups", 1) > 1:
        settings["groups"] = _conv_groups(settings, layer_call, after)
    if kind == "Reshape" and after.has_changed(layer_call.outputs[0]):
        _resize_reshape(settings, layer_call.outputs[0], after)
    if kind == "MultiHeadAttention":
        _resize_attention(settings, layer_call, shapes, changed, after)
    if kind == "Bidirectional":
        for way in ("forward", "backward"):
            inner = settings.get("layer" if way == "forward" else "backward_layer")
            if f"{way}/recurrent_kernel" in changed and inner is not None:
                inner["config"]["units"] = shapes[f"{way}/recurrent_kernel"][0]


def _resize_attention(
    settings: dict[str, Any], layer_call: CalledLayer, pruned_shapes: Shapes, changed: set[str], after: PrunedShapes
) -> None:
    """Set the shapes of an attention right; its output has as many channels as its query unless it is said."""
    update_qkv(settings, layer_call, after)
    channels = pruned_shapes["output/kernel"][-1] if "output/kernel" in pruned_shapes else 0
    is_explicit = settings.get("output_shape") is not None
    if changed and channels and (is_explicit or channels != after.shape(layer_call.inputs[0])[-1]):
        settings["output_shape"] = [channels]


def _norm_groups(settings: Mapping[str, Any], layer_call: CalledLayer, after: PrunedShapes) -> int:
    """The number of groups: each has as many channels as before."""
    axis = untuple(settings.get("axis", -1))
    axis = axis[0] if isinstance(axis, list) else axis
    groups: int = settings.get("groups", 32)
    data = layer_call.inputs[0]
    return groups if groups == -1 else after.shape(data)[axis] * groups // after.trace.shape(data)[axis]


def _conv_groups(settings: Mapping[str, Any], layer_call: CalledLayer, after: PrunedShapes) -> int:
    """The groups of a convolution; channel by channel there are as many as channels."""
    axis = 1 if settings.get("data_format") == "channels_first" else -1
    groups: int = settings["groups"]
    data = layer_call.inputs[0]
    return after.shape(data)[axis] if groups == after.trace.shape(data)[axis] else groups


def _resize_reshape(settings: dict[str, Any], value: str, after: PrunedShapes) -> None:
    target, new, old = untuple(settings["target_shape"]), after.shape(value)[1:], after.trace.shape(value)[1:]
    for axis, length in enumerate(target):
        if length != -1 and old[axis] != new[axis]:
            target[axis] = new[axis]


_WINDOW = (("filters", "kernel", -1),)
_SIZE_SETTINGS: Mapping[str, tuple[tuple[str, str, int], ...]] = {
    **dict.fromkeys(("Conv1D", "Conv2D", "Conv3D"), _WINDOW),
    **dict.fromkeys(("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"), (("filters", "kernel", -2),)),
    **dict.fromkeys(("DepthwiseConv1D", "DepthwiseConv2D"), (("depth_multiplier", "depthwise_kernel", -1),)),
    **dict.fromkeys(
        ("SeparableConv1D", "SeparableConv2D"),
        (("filters", "pointwise_kernel", -1), ("depth_multiplier", "depthwise_kernel", -1)),
    ),
    **dict.fromkeys(GATES, (("units", "recurrent_kernel", 0),)),
    "MultiHeadAttention": (("num_heads", "query/kernel", 1),),
    "Dense": (("units", "kernel", -1),),
    "Embedding": (("output_dim", "embeddings", -1),),
}
"""Settings that are lengths of weights: the setting, the weight, its axis."""
