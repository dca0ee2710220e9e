"""A Keras configuration resized after channels were removed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from prunectl.channels.adapter import PrunedShapes
from prunectl.channels.graph import Shapes
from prunectl.channels.keras.builder import CalledLayer, GraphBuilder
from prunectl.channels.keras.layer_rules import RULES, LayerResize
from prunectl.channels.keras.weights import ConfigPath, get_at
from prunectl.formats.keras.config import part, text, upgrade_class_name
from prunectl.formats.keras.flops.shapes import untuple


def update_build_config(layer: dict[str, Any], layer_call: CalledLayer, after: PrunedShapes) -> None:
    """Set right what Keras says that a layer was built for: shapes in the order of what goes in, or by its names."""
    build_config = layer.get("build_config")
    shapes_by_name = part(build_config, "shapes_dict")
    if update_qkv(shapes_by_name, layer_call, after):
        return
    values = iter(layer_call.inputs)
    for shape in shapes_in(build_config):
        update_shape(shape, next(values, ""), after)


def update_qkv(shapes_by_name: Mapping[str, Any], layer_call: CalledLayer, after: PrunedShapes) -> bool:
    """Set right the shapes of query, value and key, if these are what there is."""
    if "query_shape" not in shapes_by_name:
        return False
    inputs = (*layer_call.inputs, layer_call.inputs[-1])[:3]
    for name, value in zip(("query", "value", "key"), inputs, strict=False):
        for shape in shapes_in(shapes_by_name.get(f"{name}_shape")):
            update_shape(shape, value, after)
    return True


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
        _resize(layer, get_at(config, layer_call.path)["config"], layer_call, after, left)
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


def _resize(
    layer: dict[str, Any], original: Mapping[str, Any], layer_call: CalledLayer, after: PrunedShapes, left: Shapes
) -> None:
    """Set the numbers of channels of a layer."""
    rule = RULES.get(upgrade_class_name(text(layer, "class_name")))
    if rule is None:
        return
    settings = layer["config"]
    shapes = {leaf: left.get(tensor.name, tensor.shape) for leaf, tensor in layer_call.weights.items()}
    resize = LayerResize(layer_call, settings, original, shapes, after)
    for key, leaf, axis in rule.lengths:
        if resize.has_changed(leaf):
            settings[key if key in settings else _KERAS1_NAMES.get(key, key)] = shapes[leaf][axis]
    if rule.resize is not None:
        rule.resize(resize)
    update_qkv(settings, layer_call, after)
