"""One call of a Keras layer, to be put into a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prunectl.channels.graph import Kind
from prunectl.channels.keras.net import Net, Shape
from prunectl.formats.base import Tensor
from prunectl.formats.keras import rules
from prunectl.formats.keras.shapes import UnknownShapeError
from prunectl.formats.keras.step import Step


@dataclass(frozen=True, slots=True)
class Called:
    """A layer with what is known of its inputs; what is not makes it unknown."""

    net: Net
    names: tuple[str, ...]
    """Of the models around it, and its own."""
    step: Step
    inputs: tuple[str, ...]
    """Values, those that are given by name behind the others."""
    leaves: Mapping[str, Tensor]
    words: tuple[str, ...] = ()
    """The names of the last inputs."""

    @property
    def name(self) -> str:
        """What a user would call it."""
        return "/".join(self.names)

    @property
    def op(self) -> str:
        """Its class."""
        return self.step.kind

    @property
    def data(self) -> str:
        """The one value that goes in."""
        if len(self.inputs) != 1:
            raise UnknownShapeError
        return self.inputs[0]

    def shape(self, value: str) -> Shape:
        """Return a shape with its batch."""
        if value not in self.net.shapes:
            raise UnknownShapeError
        return self.net.shapes[value]

    @property
    def batch(self) -> int:
        """How many examples go in: more than one where steps in time are taken for examples."""
        return self.shape(self.inputs[0])[0]

    def made(self) -> Shape:
        """Return the shape of what comes out, with its batch."""
        return whole(rules.output(self.step), self.batch)

    def does(self, kind: Kind, inputs: Sequence[str], shape: Shape, **attributes: Any) -> str:
        """Put in an operation with one output."""
        if any(length == 0 for length in shape):
            raise UnknownShapeError
        return self.net.add(self.name, self.op, kind, inputs, (shape,), **attributes)[0]

    def weight(self, leaf: str, axes: Sequence[int | None]) -> str:
        """Return a weight as an operation sees it; empty if the layer has none of that name."""
        tensor = self.leaves.get(leaf)
        return "" if tensor is None else self.net.view(tensor, axes)

    def turned(self, value: str, order: Sequence[int]) -> str:
        """Put the axes of a value in another order."""
        if list(order) == list(range(len(order))):
            return value
        shape = self.shape(value)
        return self.does(Kind.TRANSPOSE, (value,), tuple(shape[axis] for axis in order), order=tuple(order))

    def forward(self, value: str) -> str:
        """Put channels in front of space, where they are not."""
        rank = len(self.shape(value))
        return value if self.step.is_channels_first else self.turned(value, (0, rank - 1, *range(1, rank - 1)))

    def back(self, value: str) -> str:
        """Put channels where the layer has them."""
        rank = len(self.shape(value))
        return value if self.step.is_channels_first else self.turned(value, (0, *range(2, rank), 1))

    def fronted(self, shape: Shape) -> Shape:
        """Return a shape of the layer's with channels in front of space."""
        return shape if self.step.is_channels_first else (shape[0], shape[-1], *shape[1:-1])


def whole(shape: Sequence[int | None] | None, batch: int) -> Shape:
    """Return a shape with its batch; UnknownShapeError if a length is not known."""
    found = [] if shape is None else [length for length in shape if length is not None]
    if shape is None or len(found) != len(shape):
        raise UnknownShapeError
    return (batch, *found)
