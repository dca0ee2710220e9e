"""A Keras configuration without some channels: what names their number, set right."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from prunectl.channels.after import After
from prunectl.channels.keras.net import Met, Net
from prunectl.channels.keras.spots import at
from prunectl.formats.keras.config import part, text
from prunectl.formats.keras.dialect import modern_kind
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
        values = iter(met.inputs)
        for said in _shapes(layer.get("build_config")):
            _shorten(said, next(values, ""), after)
        for key in _SAID:
            for said in _shapes(part(layer, "config").get(key)):
                _shorten(said, met.inputs[0] if met.inputs else "", after)
    for (spot, name, node, tensor), value in net.said.items():
        if after.has_changed(value):
            for layer in at(found, spot)["config"]["layers"]:
                _tell(layer.get("inbound_nodes"), [name, node, tensor], value, after)
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


def _shapes(said: Any) -> Iterator[list[Any]]:
    """Yield the shapes in what Keras says a layer was built for, in their order."""
    found = plain(said)
    if isinstance(found, list):
        if found and all(length is None or type(length) is int for length in found):
            yield found
        else:
            for one in found:
                yield from _shapes(one)
    elif isinstance(found, dict):
        for one in found.values():
            yield from _shapes(one)


def _shorten(said: list[Any], value: str, after: After) -> None:
    """Set the lengths right that a value no longer has."""
    if not after.has_changed(value):
        return
    old, new = after.trace.shape(value), after.shape(value)
    if len(said) != len(old):
        return
    for axis, pair in enumerate(zip(old, new, strict=True)):
        if pair[0] != pair[1] and said[axis] is not None:
            said[axis] = pair[1]


def _tell(nodes: Any, history: list[Any], value: str, after: After) -> None:
    """Set right what Keras 3 says of the shape of a value where a layer takes it."""
    if isinstance(nodes, list):
        for one in nodes:
            _tell(one, history, value, after)
    elif isinstance(nodes, dict):
        config = part(nodes, "config")
        if config.get("keras_history") == history and isinstance(config.get("shape"), list):
            _shorten(config["shape"], value, after)
        else:
            for one in nodes.values():
                _tell(one, history, value, after)


_WINDOW = (("filters", "kernel", -1),)
_NUMBERS: Mapping[str, tuple[tuple[str, str, int], ...]] = {
    **dict.fromkeys(("Conv1D", "Conv2D", "Conv3D"), _WINDOW),
    **dict.fromkeys(("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"), (("filters", "kernel", -2),)),
    **dict.fromkeys(("DepthwiseConv1D", "DepthwiseConv2D"), (("depth_multiplier", "depthwise_kernel", -1),)),
    **dict.fromkeys(
        ("SeparableConv1D", "SeparableConv2D"),
        (("filters", "pointwise_kernel", -1), ("depth_multiplier", "depthwise_kernel", -1)),
    ),
    "Dense": (("units", "kernel", -1),),
    "Embedding": (("output_dim", "embeddings", -1),),
}
"""Settings that are lengths of weights: the setting, the weight, its axis."""
