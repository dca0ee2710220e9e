"""Which indices of which weights must go together? Groups, and the families of those that live in the same places."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from prunectl.channels.adapter import GraphAdapter
from prunectl.channels.frontends import open_adapter
from prunectl.channels.labels import FIXED, AxisLabels, AxisRole, LabelTrace
from prunectl.channels.rules import propagate
from prunectl.formats.base import ModelFile
from prunectl.training.backend import ModelOrigin


@dataclass(frozen=True, slots=True)
class TensorAxis:
    """An axis of a weight, and what it does for the channels on it."""

    tensor: str
    axis: int
    role: AxisRole


@dataclass(frozen=True, slots=True)
class ChannelSlice:
    """What a channel is made of in one place."""

    place: TensorAxis
    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Channel:
    """One channel wherever it is: all of it goes, or nothing."""

    label: int
    members: tuple[ChannelSlice, ...]


@dataclass(frozen=True, slots=True)
class ChannelGroup:
    """Channels that live in the same places."""

    name: str
    """The weight that makes them first."""
    places: tuple[TensorAxis, ...]
    groups: tuple[Channel, ...]
    reason: str = ""
    """Why none of them may go."""

    @property
    def makers(self) -> tuple[str, ...]:
        """The weights that make these channels."""
        return tuple(dict.fromkeys(place.tensor for place in self.places if place.role is AxisRole.OUT))


def find_groups(trace: LabelTrace) -> tuple[ChannelGroup, ...]:
    """Return the channels of a network, in its order."""
    found: dict[int, list[tuple[int, ChannelSlice]]] = defaultdict(list)
    notes = _first_of_each_axis(trace.notes)
    for number, note in enumerate(notes):
        roots = trace.labels.roots(note.labels)
        place = TensorAxis(note.tensor, note.axis, note.role)
        order = np.argsort(roots, kind="stable")
        bounds = (np.flatnonzero(np.diff(roots[order])) + 1).tolist()
        indices, sorted_roots = order.tolist(), roots[order].tolist()
        for begin, end in pairwise([0, *bounds, len(indices)]):
            if end > begin and (root := sorted_roots[begin]) != FIXED:
                found[root].append((number, ChannelSlice(place, tuple(indices[begin:end]))))
    # By numbers of places: they are told apart for each channel, and there may be a hundred thousand.
    kin: dict[tuple[tuple[int, ...], str], list[Channel]] = defaultdict(list)
    for root, members in found.items():
        numbers, own = zip(*members, strict=True)
        kin[numbers, trace.labels.reason(root)].append(Channel(root, own))
    return tuple(_family(tuple(groups), reason) for (_, reason), groups in kin.items())


def _family(groups: tuple[Channel, ...], reason: str) -> ChannelGroup:
    places = tuple(member.place for member in groups[0].members)
    producers = [place.tensor for place in places if place.role is AxisRole.OUT]
    return ChannelGroup(next(iter(producers), places[0].tensor), places, groups, reason or _missing_producer(producers))


def _missing_producer(producers: list[str]) -> str:
    return "" if producers else "no weight makes it"


def _first_of_each_axis(notes: list[AxisLabels]) -> list[AxisLabels]:
    """Return the first note of each axis: the others say the same."""
    return list({(note.tensor, note.axis): note for note in reversed(notes)}.values())[::-1]


ORIGIN = ModelOrigin()


@dataclass(frozen=True, slots=True)
class ChannelGroups:
    """The channels of a model."""

    path: str
    families: tuple[ChannelGroup, ...]

    @property
    def channels(self) -> int:
        """How many there are."""
        return sum(len(family.groups) for family in self.families)

    @property
    def free(self) -> int:
        """How many of them may go."""
        return sum(len(family.groups) for family in self.families if not family.reason)


def channel_groups(model: ModelFile, origin: ModelOrigin = ORIGIN) -> ChannelGroups:
    """Return the channels of a model."""
    source = open_adapter(model, origin)
    return ChannelGroups(
        str(model.path), tuple(_as_in_the_file(family, source) for family in find_groups(propagate(source.graph)))
    )


def _as_in_the_file(family: ChannelGroup, source: GraphAdapter) -> ChannelGroup:
    """Return a family with each weight under the name that the file has for it."""
    places = (replace(place, tensor=source.copied_from.get(place.tensor, place.tensor)) for place in family.places)
    return replace(family, places=tuple(places))
