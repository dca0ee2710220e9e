"""Where each layer of a Keras configuration stands: in the configuration itself, and in a file of weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prunectl.formats.keras.config import Layer, part, text
from prunectl.formats.keras.inbound import name_of

Spot = tuple[str | int, ...]
"""Keys on the way to a layer."""
ROOT: Spot = ()
_WRAPPED = (("layer", ("layer", "forward_layer")), ("backward_layer", ("backward_layer",)))
"""What a wrapper says is in it, and the attributes that it keeps it in."""
_MAX_DEPTH = 40
_PLAIN = frozenset({"name"})


@dataclass(frozen=True, slots=True)
class Located:
    """A layer, and where it stands."""

    spot: Spot
    found: Mapping[str, Any]
    names: tuple[str, ...]
    """Of the models and wrappers around it, and its own."""
    slots: tuple[str, ...]
    """Paths that Keras may keep its weights under where these have only numbers."""


def located(config: Mapping[str, Any], slots: Mapping[str, Layer]) -> tuple[Located, ...]:
    """Return every layer of a model in the order of Keras; the slots are the folders that weights have only numbers in.

    Which folder is whose, `formats/keras/numbering.py` knows; the rest have none.
    """
    return tuple(_inside(config, (), (), {id(layer.config): path for path, layer in slots.items()}))


def at(config: Any, spot: Spot) -> Any:
    """Return what stands somewhere in a configuration."""
    for key in spot:
        config = config[key]
    return config


def is_operation(found: Mapping[str, Any]) -> bool:
    """Whether this is a bare function of Keras 3 rather than a layer."""
    if "module" in found:
        return ".ops." in text(found, "module")
    return found.get("config", {}).keys() == _PLAIN if isinstance(found.get("config"), dict) else False


def _inside(
    model: Mapping[str, Any], around: Spot, names: tuple[str, ...], folders: Mapping[int, str]
) -> Iterator[Located]:
    entries = part(model, "config").get("layers")
    for number, found in enumerate(entries if isinstance(entries, list) else ()):
        if isinstance(found, dict):
            folder = folders.get(id(found.get("config")))
            spot = (*around, "config", "layers", number)
            slots = () if folder is None else (folder,)
            yield from _with_inner(Located(spot, found, (*names, name_of(found)), slots), folders)


def _with_inner(one: Located, folders: Mapping[int, str]) -> Iterator[Located]:
    yield one
    if len(one.names) > _MAX_DEPTH:
        return
    yield from _inside(one.found, one.spot, one.names, folders)
    for key, attributes in _WRAPPED:
        inner = part(part(one.found, "config"), key)
        if text(inner, "class_name"):
            slots = tuple(f"{slot}/{attribute}" for slot in one.slots for attribute in attributes)
            names = (*one.names, name_of(inner))
            yield from _with_inner(Located((*one.spot, "config", key), inner, names, slots), folders)
