"""Which indices of which weights must go together? Groups, and the families of those that live in the same places."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from prunectl.channels.labels import FIXED
from prunectl.channels.trace import Note, Part, Trace


@dataclass(frozen=True, slots=True)
class Place:
    """An axis of a weight, and what it does for the channels on it."""

    tensor: str
    axis: int
    part: Part


@dataclass(frozen=True, slots=True)
class Member:
    """What a channel is made of in one place."""

    place: Place
    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """One channel wherever it is: all of it goes, or nothing."""

    label: int
    members: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class Family:
    """Channels that live in the same places."""

    name: str
    """The weight that makes them first."""
    places: tuple[Place, ...]
    groups: tuple[Group, ...]
    reason: str = ""
    """Why none of them may go."""

    @property
    def makers(self) -> tuple[str, ...]:
        """The weights that make these channels."""
        return tuple(dict.fromkeys(place.tensor for place in self.places if place.part is Part.OUT))


def families(trace: Trace) -> tuple[Family, ...]:
    """Return the channels of a network, in its order."""
    found: dict[int, list[tuple[int, Member]]] = defaultdict(list)
    notes = _once(trace.notes)
    for number, note in enumerate(notes):
        roots = trace.labels.roots(note.labels)
        place = Place(note.tensor, note.axis, note.part)
        order = np.argsort(roots, kind="stable")
        bounds = (np.flatnonzero(np.diff(roots[order])) + 1).tolist()
        indices, sorted_roots = order.tolist(), roots[order].tolist()
        for begin, end in pairwise([0, *bounds, len(indices)]):
            if end > begin and (root := sorted_roots[begin]) != FIXED:
                found[root].append((number, Member(place, tuple(indices[begin:end]))))
    # By numbers of places: they are told apart for each channel, and there may be a hundred thousand.
    kin: dict[tuple[tuple[int, ...], str], list[Group]] = defaultdict(list)
    for root, members in found.items():
        numbers, own = zip(*members, strict=True)
        kin[numbers, trace.labels.reason(root)].append(Group(root, own))
    return tuple(_family(tuple(groups), reason) for (_, reason), groups in kin.items())


def _family(groups: tuple[Group, ...], reason: str) -> Family:
    places = tuple(member.place for member in groups[0].members)
    makers = [place.tensor for place in places if place.part is Part.OUT]
    return Family(next(iter(makers), places[0].tensor), places, groups, reason or _unmade(makers))


def _unmade(makers: list[str]) -> str:
    return "" if makers else "no weight makes it"


def _once(notes: list[Note]) -> list[Note]:
    """Return the first note of each axis: the others say the same."""
    return list({(note.tensor, note.axis): note for note in reversed(notes)}.values())[::-1]
