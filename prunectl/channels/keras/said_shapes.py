"""Shapes that a Keras configuration says of values, set right where these lose channels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prunectl.channels.after import After
from prunectl.channels.keras.net import Met
from prunectl.formats.keras.config import part
from prunectl.formats.keras.shapes import plain


def tell_built(layer: dict[str, Any], met: Met, after: After) -> None:
    """Set right what Keras says that a layer was built for: shapes in the order of what goes in, or by its names."""
    said = layer.get("build_config")
    named = part(said, "shapes_dict")
    if "query_shape" in named:
        tell_three(named, met, after)
        return
    values = iter(met.inputs)
    for shape in shapes_in(said):
        shorten(shape, next(values, ""), after)


def tell_three(said: Mapping[str, Any], met: Met, after: After) -> None:
    """Set right the shapes of query, value and key."""
    three = (*met.inputs, met.inputs[-1])[:3]
    for word, value in zip(("query", "value", "key"), three, strict=False):
        for shape in shapes_in(said.get(f"{word}_shape")):
            shorten(shape, value, after)


def shapes_in(said: Any) -> Iterator[list[Any]]:
    """Yield the shapes in what Keras says a layer was built for, in their order."""
    found = plain(said)
    if isinstance(found, list):
        if found and all(length is None or type(length) is int for length in found):
            yield found
        else:
            for one in found:
                yield from shapes_in(one)
    elif isinstance(found, dict):
        for one in found.values():
            yield from shapes_in(one)


def shorten(said: list[Any], value: str, after: After) -> None:
    """Set the lengths right that a value no longer has."""
    if not after.has_changed(value):
        return
    old, new = after.trace.shape(value), after.shape(value)
    if len(said) != len(old):
        return
    for axis, pair in enumerate(zip(old, new, strict=True)):
        if pair[0] != pair[1] and said[axis] is not None:
            said[axis] = pair[1]


def tell(nodes: Any, values: Mapping[tuple[str, int, int], str], after: After) -> None:
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
