"""One call of a Keras layer: its class, its settings and the shapes it is given."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prunectl.formats.keras.shapes import UnknownShapeError, plain
from prunectl.formats.lengths import MAX_LENGTH, Length, Shape

_AXES = re.compile(r"([123])D")


@dataclass(frozen=True, slots=True)
class Step:
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
        found = plain(self.config.get(key))
        if isinstance(found, list) and len(found) == count and all(type(one) is int for one in found):
            if all(abs(one) <= MAX_LENGTH for one in found):
                return tuple(found)
            raise UnknownShapeError
        if isinstance(found, list):
            if len(found) != 1:
                raise UnknownShapeError
            return (Step(self.kind, {key: found[0]}, ()).number(key, default),) * count
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
