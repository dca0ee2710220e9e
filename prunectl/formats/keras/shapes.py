"""Shapes of what flows between Keras layers, without the batch, as far as they are known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prunectl.formats.lengths import MAX_LENGTH, Length, Shape

MAX_AXES = 32
MAX_LISTED = 4096
"""No layer has a setting that is a longer list."""
_MAX_NESTING = 4
_TUPLES = ("__tuple__", "TensorShape")


class UnknownShapeError(Exception):
    """A shape that the configuration does not tell."""


def scaled(length: Length, factor: int) -> Length:
    """Return a length that many times."""
    return None if length is None else length * factor


def checked(shape: Iterable[Length]) -> Shape:
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


def plain(value: Any) -> Any:
    """Return the list behind what Keras writes for a tuple, or a value that is none."""
    found = value.get("items") if isinstance(value, dict) and value.get("class_name") in _TUPLES else value
    return None if isinstance(found, list) and len(found) > MAX_LISTED else found


def shape_in(value: Any) -> Shape | None:
    """Return a shape without its batch, if this is a shape."""
    found = plain(value)
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
    found = plain(value)
    several = found.values() if isinstance(found, Mapping) else found if isinstance(found, list) else ()
    return tuple(shape for one in several for shape in shapes_in(one, nesting + 1))
