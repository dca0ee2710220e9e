"""One operation of an ONNX graph with what is known of its inputs, for rules about shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prunectl.formats.onnx.proto import Node

Shape = tuple[int, ...]
MAX_LENGTH = 1 << 48
"""An axis longer than this is a lie."""
MAX_AXES = 64


class UnknownShapeError(Exception):
    """Shapes that depend on what the file does not say."""


@dataclass(frozen=True, slots=True)
class Step:
    """One operation, with what is known of its inputs."""

    node: Node
    inputs: Sequence[Shape | None]
    values: Sequence[Shape | None]
    """Inputs that are short lists of known whole numbers, such as shapes."""
    lists: Callable[[Node, str], Shape | None]
    """Reads an attribute that is a list of whole numbers."""

    def shape(self, place: int) -> Shape:
        """The shape of an input."""
        found = self.inputs[place] if place < len(self.inputs) else None
        if found is None:
            raise UnknownShapeError
        return found

    def numbers(self, place: int) -> Shape:
        """An input that is a list of known numbers."""
        found = self.values[place] if place < len(self.values) else None
        if found is None:
            raise UnknownShapeError
        return found

    def setting(self, name: str, place: int, default: Shape | None = None) -> Shape:
        """A list that is an attribute in old sets of operators and an input in new ones."""
        found = self.lists(self.node, name)
        if found is not None:
            return found
        if place >= len(self.node.inputs) or not self.node.inputs[place]:
            if default is None:
                raise UnknownShapeError
            return default
        return self.numbers(place)

    def axis(self, rank: int, default: int = 0) -> int:
        """The attribute `axis`, counted from the front."""
        return wrapped(signed(self.node.number("axis", default)), rank)


def signed(number: int) -> int:
    """Return an attribute as the signed number that it is."""
    return number - (1 << 64) if number >= 1 << 63 else number


def wrapped(axis: int, rank: int) -> int:
    """Return an axis counted from the front."""
    if not -rank <= axis < rank:
        raise UnknownShapeError
    return axis % rank


def broadcast(*shapes: Shape) -> Shape:
    """Return the shape that arrays of these shapes are stretched to."""
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    return tuple(next((length for length in lengths if length != 1), 1) for lengths in zip(*padded, strict=True))
