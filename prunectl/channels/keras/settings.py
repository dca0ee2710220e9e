"""A Keras configuration without some channels: what names their number, set right."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from prunectl.channels.after import After
from prunectl.channels.keras.net import Met, Net
from prunectl.channels.keras.said_shapes import shapes_in, shorten, tell, tell_built, tell_three
from prunectl.channels.keras.spots import Spot, at
from prunectl.formats.keras.config import part, text
from prunectl.formats.keras.dialect import modern_kind
from prunectl.formats.keras.recurrent import GATES
from prunectl.formats.keras.shapes import plain

Shapes = Mapping[str, tuple[int, ...]]
"""Of what is left of each weight."""
_SAID = ("batch_input_shape", "batch_shape", "build_input_shape", "input_shape")
_OLD_WORDS = {"filters": "nb_filter", "units": "output_dim"}
"""What Keras 1 called a setting."""


def rewritten(config: Mapping[str, Any], net: Net, after: After, left: Shapes) -> dict[str, Any]:
    """Return the configuration of the smaller network."""
    found: dict[str, Any] = copy.deepcopy(dict(config))
    for met in net.met:
        layer = at(found, met.spot)
        _resize(layer, met, after, left)
        if modern_kind(text(layer, "class_name")) == "GroupNormalization" and after.has_changed(met.inputs[0]):
            layer["config"]["groups"] = _fewer_groups(at(config, met.spot)["config"], met, after)
        tell_built(layer, met, after)
        for key in _SAID:
            for said in shapes_in(part(layer, "config").get(key)):
                shorten(said, met.inputs[0] if met.inputs else "", after)
    values: dict[Spot, dict[tuple[str, int, int], str]] = {}
    for (spot, name, node, tensor), value in net.said.items():
        if after.has_changed(value):
            values.setdefault(spot, {})[name, node, tensor] = value
    for spot, changed in values.items():
        for layer in at(found, spot)["config"]["layers"]:
            tell(layer.get("inbound_nodes"), changed, after)
    return found


def _resize(layer: dict[str, Any], met: Met, after: After, left: Shapes) -> None:
    """Set the numbers of channels of a layer."""
    kind = modern_kind(text(layer, "class_name"))
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


def _attend(settings: dict[str, Any], met: Met, left: Shapes, changed: set[str], after: After) -> None:
    """Set the shapes of an attention right; its output has as many channels as its query unless it is said."""
    tell_three(settings, met, after)
    made = left["output/kernel"][-1] if "output/kernel" in left else 0
    is_said = settings.get("output_shape") is not None
    if changed and made and (is_said or made != after.shape(met.inputs[0])[-1]):
        settings["output_shape"] = [made]


def _fewer_groups(settings: Mapping[str, Any], met: Met, after: After) -> int:
    """Return the number of groups: each has as many channels as before."""
    axis = plain(settings.get("axis", -1))
    axis = axis[0] if isinstance(axis, list) else axis
    groups: int = settings.get("groups", 32)
    data = met.inputs[0]
    return groups if groups == -1 else after.shape(data)[axis] * groups // after.trace.shape(data)[axis]


def _groups(settings: Mapping[str, Any], met: Met, after: After) -> int:
    """Return the groups of a convolution; channel by channel there are as many as channels."""
    axis = 1 if settings.get("data_format") == "channels_first" else -1
    groups: int = settings["groups"]
    data = met.inputs[0]
    return after.shape(data)[axis] if groups == after.trace.shape(data)[axis] else groups


def _reshape(settings: dict[str, Any], value: str, after: After) -> None:
    target, new, old = plain(settings["target_shape"]), after.shape(value)[1:], after.trace.shape(value)[1:]
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
