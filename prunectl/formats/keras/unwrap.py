"""A Keras configuration without the pruning wrappers of tfmot: each layer plain again, under its own name."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prunectl.formats.keras.config import WRAPPER, inner_layer, part, text

_REFERRING = frozenset({"inbound_nodes", "input_layers", "output_layers"})
_MOVED = ("batch_input_shape", "batch_shape")
"""What the first layer of a model says of its input, also when it is wrapped."""


@dataclass(frozen=True, slots=True)
class Unwrapped:
    """An unwrapped configuration, and the wrappers removed from it."""

    config: Any
    wrappers: Mapping[str, int]
    """Names of the wrappers, each with the bytes of text that it took."""


class LayerNameConflictError(Exception):
    """A wrapped layer cannot have its name back, since another layer has it."""


def unwrap_config(config: Any) -> Unwrapped:
    """A configuration with every wrapped layer in the place of its wrapper."""
    wrappers: dict[str, int] = {}
    return Unwrapped(_plain(config, {}, wrappers), wrappers)


def _plain(value: Any, names: Mapping[str, str], wrappers: dict[str, int]) -> Any:
    if isinstance(value, list):
        return [_plain(item, names, wrappers) for item in value]
    if not isinstance(value, dict):
        return value
    inner = inner_layer(value)
    if inner is not None:
        layer = _in_place_of(value, inner)
        wrappers[text(value["config"], "name") or WRAPPER] = len(json.dumps(value)) - len(json.dumps(layer))
        return _plain(layer, names, wrappers)
    if isinstance(value.get("layers"), list):
        names = _new_names(value["layers"])
    return {
        key: _referring(member, names) if key in _REFERRING else _plain(member, names, wrappers)
        for key, member in value.items()
    }


def _in_place_of(wrapper: Mapping[str, Any], inner: Mapping[str, Any]) -> dict[str, Any]:
    """A wrapped layer with what its model says of the wrapper: its calls, its input, its format."""
    wrapper_config = part(wrapper, "config")
    moved = {key: wrapper_config[key] for key in _MOVED if key in wrapper_config}
    # Old formats give a layer fewer keys, and loaders tell the formats by these.
    layer = {key: value for key, value in inner.items() if key in wrapper or key in {"class_name", "config"}}
    layer["config"] = {**moved, **part(inner, "config")}
    rest = {
        key: value for key, value in wrapper.items() if key not in layer and key not in {"module", "registered_name"}
    }
    if "name" in rest:
        rest["name"] = _name(inner)
    return {**layer, **rest}


def _new_names(layers: list[Any]) -> dict[str, str]:
    """What the wrapped layers of a model are called, by the names of their wrappers."""
    inner = {_name(layer): inner_layer(layer) for layer in layers}
    names = {name: _name(layer) for name, layer in inner.items() if layer is not None}
    counts = Counter(names.values())
    for wrapper, name in names.items():
        # A wrapper that already has the name of its layer stands in nobody's way but its own.
        if (name in inner and name != wrapper) or counts[name] > 1:
            raise LayerNameConflictError(name)
    return names


def _referring(value: Any, names: Mapping[str, str]) -> Any:
    """How a model refers to its layers, such as `["dense", 0, 0, {}]`, by their new names."""
    if isinstance(value, dict):
        return {
            key: [names.get(member[0], member[0]), *member[1:]]
            if _is_history(key, member)
            else _referring(member, names)
            for key, member in value.items()
        }
    if not isinstance(value, list):
        return value
    if len(value) >= 3 and isinstance(value[0], str) and type(value[1]) is int and type(value[2]) is int:
        return [names.get(value[0], value[0]), *(_referring(item, names) for item in value[1:])]
    return [_referring(item, names) for item in value]


def _is_history(key: str, value: Any) -> bool:
    return key == "keras_history" and isinstance(value, list) and bool(value) and isinstance(value[0], str)


def _name(layer: Any) -> str:
    return text(part(layer, "config"), "name") or text(layer, "name")
