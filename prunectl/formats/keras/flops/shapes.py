"""Shapes of what flows between Keras layers, without the batch, as far as they are known."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prunectl.formats.base import MAX_LENGTH, Length, Shape

MAX_AXES = 32
MAX_LISTED = 4096
"""No layer has a setting that is a longer list."""
_MAX_NESTING = 4
_TUPLES = ("__tuple__", "TensorShape")


class UnknownShapeError(Exception):
    """A shape that the configuration does not tell."""


def scale_dim(length: Length, factor: int) -> Length:
    """Return a length that many times."""
    return None if length is None else length * factor


def validate_shape(shape: Iterable[Length]) -> Shape:
    """Return a shape if an array can have it."""
    found = tuple(shape)
    if len(found) > MAX_AXES or any(length is not None and not 0 <= length <= MAX_LENGTH for length in found):
        raise UnknownShapeError
    return found


def broadcast(shapes: Iterable[Shape]) -> Shape:
    """Return the shape that arrays of these shapes are stretched to."""
    several = tuple(shapes)
    rank = max(map(len, several), default=0)
    padded = [(1,) * (rank - len(shape)) + shape for shape in several]
    return tuple(_stretched(lengths) for lengths in zip(*padded, strict=True))


def _stretched(lengths: tuple[Length, ...]) -> Length:
    long = {length for length in lengths if length not in {1, None}}
    if long:
        return long.pop() if len(long) == 1 else None
    return None if None in lengths else 1


def untuple(value: Any) -> Any:
    """Return the list behind what Keras writes for a tuple, or a value that is none."""
    found = value.get("items") if isinstance(value, dict) and value.get("class_name") in _TUPLES else value
    return None if isinstance(found, list) and len(found) > MAX_LISTED else found


def shape_in(value: Any) -> Shape | None:
    """Return a shape without its batch, if this is a shape."""
    found = untuple(value)
    if not isinstance(found, list) or not found or len(found) > MAX_AXES:
        return None
    if not all(length is None or type(length) is int for length in found):
        return None
    lengths = [None if length is None or not 0 <= length <= MAX_LENGTH else length for length in found]
    return tuple(lengths[1:])


def shapes_in(value: Any, nesting: int = 0) -> tuple[Shape | None, ...]:
    """Return the shapes in what may be one of them, or several in a list or under names."""
    shape = shape_in(value)
    if shape is not None or nesting > _MAX_NESTING:
        return (shape,)
    found = untuple(value)
    several = found.values() if isinstance(found, Mapping) else found if isinstance(found, list) else ()
    return tuple(shape for one in several for shape in shapes_in(one, nesting + 1))


_AXES = re.compile(r"([123])D")


@dataclass(frozen=True, slots=True)
class LayerCall:
    """A layer with what is known of its inputs; settings are in the words of Keras 2."""

    kind: str
    config: Mapping[str, Any]
    inputs: tuple[Shape | None, ...]
    keywords: Mapping[str, Shape | None] = field(default_factory=dict)
    """Inputs that are given by name, such as the `value` of an attention."""

    @property
    def everything(self) -> tuple[Shape, ...]:
        """The shapes of all its inputs, if they are known."""
        found = (*self.inputs, *self.keywords.values())
        if not found or None in found:
            raise UnknownShapeError
        return tuple(shape for shape in found if shape is not None)

    def shape(self, place: int = 0, keyword: str = "") -> Shape:
        """The shape of an input, given by place or by name."""
        found = self.keywords.get(keyword)
        if found is None and place < len(self.inputs):
            found = self.inputs[place]
        if found is None:
            raise UnknownShapeError
        return found

    def number(self, key: str, default: int | None = None) -> int:
        """A setting that is a whole number."""
        found = self.config.get(key)
        if type(found) is not int:
            found = default
        if found is None or abs(found) > MAX_LENGTH:
            raise UnknownShapeError
        return found

    def numbers(self, key: str, count: int, default: int | None = None) -> tuple[int, ...]:
        """A setting that is a number for each axis, or one for all of them."""
        found = untuple(self.config.get(key))
        if isinstance(found, list) and len(found) == count and all(type(one) is int for one in found):
            if all(abs(one) <= MAX_LENGTH for one in found):
                return tuple(found)
            raise UnknownShapeError
        if isinstance(found, list):
            if len(found) != 1:
                raise UnknownShapeError
            return (LayerCall(self.kind, {key: found[0]}, ()).number(key, default),) * count
        return (self.number(key, default),) * count

    def word(self, key: str, default: str = "") -> str:
        """A setting that is a word."""
        found = self.config.get(key)
        return found.lower() if isinstance(found, str) else default

    def flag(self, key: str) -> bool:
        """A setting that is off unless it is on."""
        return self.config.get(key) is True

    @property
    def is_channels_first(self) -> bool:
        """Whether the channels stand before the space."""
        return self.word("data_format") == "channels_first"

    @property
    def axes(self) -> int:
        """Number of axes of the space that the layer works on, as the name of its class has it."""
        found = _AXES.search(self.kind)
        if found is None:
            raise UnknownShapeError
        return int(found[1])

    def image(self, shape: Shape | None = None) -> tuple[Shape, Length]:
        """The space and the channels of the input; the class alone tells how many axes there are."""
        found = shape if shape is not None else self.inputs[0] if self.inputs else None
        if found is None:
            return (None,) * self.axes, None
        if len(found) != self.axes + 1:
            raise UnknownShapeError
        return (found[1:], found[0]) if self.is_channels_first else (found[:-1], found[-1])

    def joined(self, space: Shape, channels: Length) -> Shape:
        """The shape of an image."""
        return (channels, *space) if self.is_channels_first else (*space, channels)


@dataclass(frozen=True, slots=True)
class Matmul:
    """One multiplication by a weight, or by another input where it has no leaf."""

    leaf: str
    """The last of the weight's name, as Keras has it."""
    shape: Shape
    """The shape of the weight."""
    times: Shape
    """Lengths of the axes along which it is used again and again."""
    gates: int = 1
    """Into how many weights Keras 1 splits it."""
    turn: int = 0
    """Its number among weights that only their order tells apart."""
