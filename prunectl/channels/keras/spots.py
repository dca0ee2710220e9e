"""Where each layer of a Keras configuration stands: in the configuration itself, and in a file of weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prunectl.formats.keras.config import part, snake_case, text
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


def located(config: Mapping[str, Any], container: str) -> tuple[Located, ...]:
    """Return every layer of a model in the order of Keras, which calls its list of layers by some word."""
    return tuple(_inside(config, Located(ROOT, config, (), ("",)), container))


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


def _inside(model: Mapping[str, Any], around: Located, container: str) -> Iterator[Located]:
    used: Counter[str] = Counter()
    entries = part(model, "config").get("layers")
    for number, found in enumerate(entries if isinstance(entries, list) else ()):
        if not isinstance(found, dict):
            continue
        slots: tuple[str, ...] = ()
        if not is_operation(found):
            slug = snake_case(text(found, "class_name").rpartition(">")[2])
            own = f"{slug}_{used[slug]}" if used[slug] else slug
            used[slug] += 1
            slots = tuple(f"{slot}{container}/{own}" for slot in around.slots)
        spot = (*around.spot, "config", "layers", number)
        yield from _with_inner(Located(spot, found, (*around.names, name_of(found)), slots), container)


def _with_inner(one: Located, container: str) -> Iterator[Located]:
    yield one
    if len(one.names) > _MAX_DEPTH:
        return
    below = Located(one.spot, one.found, one.names, tuple(f"{slot}/" for slot in one.slots))
    yield from _inside(one.found, below, container)
    for key, attributes in _WRAPPED:
        inner = part(part(one.found, "config"), key)
        if text(inner, "class_name"):
            slots = tuple(f"{slot}/{attribute}" for slot in one.slots for attribute in attributes)
            names = (*one.names, name_of(inner))
            yield from _with_inner(Located((*one.spot, "config", key), inner, names, slots), container)
