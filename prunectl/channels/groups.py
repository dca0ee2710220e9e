"""Which channels of a model go together, and which may not go at all?"""

from __future__ import annotations

from dataclasses import dataclass, replace

from prunectl.channels.couple import Family, families
from prunectl.channels.languages import read
from prunectl.channels.rules import follow
from prunectl.channels.source import Source
from prunectl.formats.base import ModelFile
from prunectl.training.network import Origin

ORIGIN = Origin()


@dataclass(frozen=True, slots=True)
class Groups:
    """The channels of a model."""

    path: str
    families: tuple[Family, ...]

    @property
    def channels(self) -> int:
        """How many there are."""
        return sum(len(family.groups) for family in self.families)

    @property
    def free(self) -> int:
        """How many of them may go."""
        return sum(len(family.groups) for family in self.families if not family.reason)


def groups(model: ModelFile, origin: Origin = ORIGIN) -> Groups:
    """Return the channels of a model."""
    source = read(model, origin)
    return Groups(str(model.path), tuple(_as_in_the_file(family, source) for family in families(follow(source.graph))))


def _as_in_the_file(family: Family, source: Source) -> Family:
    """Return a family with each weight under the name that the file has for it."""
    places = (replace(place, tensor=source.copies.get(place.tensor, place.tensor)) for place in family.places)
    return replace(family, places=tuple(places))
