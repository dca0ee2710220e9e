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


def tell_built(layer: dict[str, Any], met: CalledLayer, after: PrunedShapes) -> None:
    """Set right what Keras says that a layer was built for: shapes in the order of what goes in, or by its names."""
    said = layer.get("build_config")
    named = part(said, "shapes_dict")
    if "query_shape" in named:
        tell_three(named, met, after)
        return
    values = iter(met.inputs)
    for shape in shapes_in(said):
        shorten(shape, next(values, ""), after)


def tell_three(said: Mapping[str, Any], met: CalledLayer, after: PrunedShapes) -> None:
    """Set right the shapes of query, value and key."""
    three = (*met.inputs, met.inputs[-1])[:3]
    for word, value in zip(("query", "value", "key"), three, strict=False):
        for shape in shapes_in(said.get(f"{word}_shape")):
            shorten(shape, value, after)


def shapes_in(said: Any) -> Iterator[list[Any]]:
    """Yield the shapes in what Keras says a layer was built for, in their order."""
    found = untuple(said)
    if isinstance(found, list):
        if found and all(length is None or type(length) is int for length in found):
            yield found
        else:
            for one in found:
                yield from shapes_in(one)
    elif isinstance(found, dict):
        for one in found.values():
            yield from shapes_in(one)


def shorten(said: list[Any], value: str, after: PrunedShapes) -> None:
    """Set the lengths right that a value no longer has."""
    if not after.has_changed(value):
        return
    old, new = after.trace.shape(value), after.shape(value)
    if len(said) != len(old):
        return
    for axis, pair in enumerate(zip(old, new, strict=True)):
        if pair[0] != pair[1] and said[axis] is not None:
            said[axis] = pair[1]


def tell(nodes: Any, values: Mapping[tuple[str, int, int], str], after: PrunedShapes) -> None:
    """Set right what Keras 3 says of the shapes of values where a layer takes them: a layer, a call, an output."""
    if isinstance(nodes, list):
        for one in nodes:
            tell(one, values, after)
    elif isinstance(nodes, dict):
        config = part(nodes, "config")
        history, shape = config.get("keras_history"), config.get("shape")
        if isinstance(history, list) and isinstance(shape, list):
            shorten(shape, values.get(tuple(history), ""), after)
        else:
            for one in nodes.values():
                tell(one, values, after)


Shapes = Mapping[str, tuple[int, ...]]
"""Of what is left of each weight."""
_SAID = ("batch_input_shape", "batch_shape", "build_input_shape", "input_shape")
_OLD_WORDS = {"filters": "nb_filter", "units": "output_dim"}
"""What Keras 1 called a setting."""


def resize_config(config: Mapping[str, Any], net: GraphBuilder, after: PrunedShapes, left: Shapes) -> dict[str, Any]:
    """Return the configuration of the smaller network."""
    found: dict[str, Any] = copy.deepcopy(dict(config))
    for met in net.met:
        layer = get_at(found, met.spot)
        _resize(layer, met, after, left)
        if upgrade_class_name(text(layer, "class_name")) == "GroupNormalization" and after.has_changed(met.inputs[0]):
            layer["config"]["groups"] = _fewer_groups(get_at(config, met.spot)["config"], met, after)
        tell_built(layer, met, after)
        for key in _SAID:
            for said in shapes_in(part(layer, "config").get(key)):
                shorten(said, met.inputs[0] if met.inputs else "", after)
    values: dict[ConfigPath, dict[tuple[str, int, int], str]] = {}
    for (spot, name, node, tensor), value in net.said.items():
        if after.has_changed(value):
            values.setdefault(spot, {})[name, node, tensor] = value
    for spot, changed in values.items():
        for layer in get_at(found, spot)["config"]["layers"]:
            tell(layer.get("inbound_nodes"), changed, after)
    return found


def _resize(layer: dict[str, Any], met: CalledLayer, after: PrunedShapes, left: Shapes) -> None:
    """Set the numbers of channels of a layer."""
    kind = upgrade_class_name(text(layer, "class_name"))
    shapes = {leaf: left.get(tensor.name, tensor.shape) for leaf, tensor in met.leaves.items()}
    settings = layer["config"]
    changed = {leaf for leaf, tensor in met.leaves.items() if shapes[leaf] != tensor.shape}
    for key, leaf, axis in _NUMBERS.get(kind, ()):
        if leaf in changed:
            settings[key if key in settings else _OLD_WORDS.get(key, key)] = shapes[leaf][axis]
    if "kernel" in changed and settings.get("groups", 1) > 1:
        settings["groups"] = _groups(settings, met, after)
    if kind == "Reshape" and after.has_changed(met.outputs[0]):
        _reshape(settings, met.outputs[0], after)
    if kind == "MultiHeadAttention":
        _attend(settings, met, shapes, changed, after)
    if kind == "Bidirectional":
        for way in ("forward", "backward"):
            inner = settings.get("layer" if way == "forward" else "backward_layer")
            if f"{way}/recurrent_kernel" in changed and inner is not None:
                inner["config"]["units"] = shapes[f"{way}/recurrent_kernel"][0]


def _attend(settings: dict[str, Any], met: CalledLayer, left: Shapes, changed: set[str], after: PrunedShapes) -> None:
    """Set the shapes of an attention right; its output has as many channels as its query unless it is said."""
    tell_three(settings, met, after)
    made = left["output/kernel"][-1] if "output/kernel" in left else 0
    is_said = settings.get("output_shape") is not None
    if changed and made and (is_said or made != after.shape(met.inputs[0])[-1]):
        settings["output_shape"] = [made]


def _fewer_groups(settings: Mapping[str, Any], met: CalledLayer, after: PrunedShapes) -> int:
    """Return the number of groups: each has as many channels as before."""
    axis = untuple(settings.get("axis", -1))
    axis = axis[0] if isinstance(axis, list) else axis
    groups: int = settings.get("groups", 32)
    data = met.inputs[0]
    return groups if groups == -1 else after.shape(data)[axis] * groups // after.trace.shape(data)[axis]


def _groups(settings: Mapping[str, Any], met: CalledLayer, after: PrunedShapes) -> int:
    """Return the groups of a convolution; channel by channel there are as many as channels."""
    axis = 1 if settings.get("data_format") == "channels_first" else -1
    groups: int = settings["groups"]
    data = met.inputs[0]
    return after.shape(data)[axis] if groups == after.trace.shape(data)[axis] else groups


def _reshape(settings: dict[str, Any], value: str, after: PrunedShapes) -> None:
    target, new, old = untuple(settings["target_shape"]), after.shape(value)[1:], after.trace.shape(value)[1:]
    for axis, length in enumerate(target):
        if length != -1 and old[axis] != new[axis]:
            target[axis] = new[axis]


_WINDOW = (("filters", "kernel", -1),)
_NUMBERS: Mapping[str, tuple[tuple[str, str, int], ...]] = {
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
