"""What is to change in an HDF5 file, put down before anything is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from prunectl.formats.stripping import Removed


@dataclass(frozen=True, slots=True)
class Edits:
    """Changes by path, all in the words of the old file."""

    removed: tuple[Removed, ...] = ()
    drops: tuple[str, ...] = ()
    moves: Mapping[str, str] = field(default_factory=dict)
    attributes: Mapping[tuple[str, str], str | list[str] | None] = field(default_factory=dict)
    """New values by group and key; None where the attribute goes."""
    masks: Mapping[str, str] = field(default_factory=dict)
    """The mask that a weight is multiplied by."""
    halves: frozenset[str] = frozenset()
    """What becomes 16-bit floats."""

    @property
    def is_empty(self) -> bool:
        """Whether the file stays as it is."""
        return not any((self.drops, self.moves, self.attributes, self.masks, self.halves))


def merged(pieces: Iterable[Edits]) -> Edits:
    """Return all changes together."""
    several = list(pieces)
    return Edits(
        removed=tuple(thing for one in several for thing in one.removed),
        drops=tuple(path for one in several for path in one.drops),
        moves=dict(pair for one in several for pair in one.moves.items()),
        attributes=dict(pair for one in several for pair in one.attributes.items()),
        masks=dict(pair for one in several for pair in one.masks.items()),
        halves=frozenset(path for one in several for path in one.halves),
    )
