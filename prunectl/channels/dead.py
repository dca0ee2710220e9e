"""Which channels can go without a trace? Those that nothing reads, and those that say the same whatever goes in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from prunectl.channels.choose import Loss
from prunectl.channels.couple import Family, Group
from prunectl.channels.folding import fold
from prunectl.channels.source import Source
from prunectl.channels.trace import Part, Trace
from prunectl.formats.base import Array
from prunectl.pruning.plan import Skip


@dataclass(frozen=True, slots=True)
class Dead:
    """Channels that make no difference."""

    losses: tuple[Loss, ...]
    skips: tuple[Skip, ...]
    weights: Mapping[str, Array]
    """Weights that take over what these channels always said."""


def dead(source: Source, trace: Trace, found: Sequence[Family], wanted: Sequence[Family]) -> Dead:
    """Return which channels of the wanted families are dead; what they always say is folded into what reads them.

    A channel that says something else at the borders, as behind a padding, stays, and that is said.
    """
    weights = source.graph.weights
    unread = {group.label for family in wanted for group in family.groups if _are_zero(group, Part.IN, weights)}
    unmade = {
        group.label
        for family in wanted
        for group in family.groups
        if group.label not in unread and _are_zero(group, Part.OUT, weights)
    }
    skips: list[Skip] = []
    while True:
        folded, blocked = _folded(source, trace, found, unmade)
        if not blocked:
            break
        for reader, labels in blocked:
            skips.append(Skip(reader, "it reads what is always the same, and has nowhere to keep it"))
            unmade -= labels
    gone = unread | unmade
    return Dead(tuple(_loss(family, gone) for family in wanted), tuple(skips), folded)


def _loss(family: Family, gone: set[int]) -> Loss:
    dropped = [number for number, group in enumerate(family.groups) if group.label in gone]
    # A tensor without channels is none.
    return Loss(family, tuple(dropped if len(dropped) < len(family.groups) else dropped[1:]))


def _are_zero(group: Group, part: Part, weights: Mapping[str, Array]) -> bool:
    members = [member for member in group.members if member.place.part is part]
    return bool(members) and not any(
        np.take(weights[member.place.tensor], member.indices, member.place.axis).any() for member in members
    )


def _folded(
    source: Source, trace: Trace, found: Iterable[Family], unmade: set[int]
) -> tuple[dict[str, Array], list[tuple[str, set[int]]]]:
    """Fold what reads these channels, one operation after the other; return what could not be folded too."""
    read: dict[tuple[str, int], dict[int, tuple[int, ...]]] = {}
    for family in found:
        for group in family.groups:
            for member in group.members if group.label in unmade else ():
                if member.place.part is Part.IN:
                    read.setdefault((member.place.tensor, member.place.axis), {})[group.label] = member.indices
    weights: dict[str, Array] = {}
    blocked: list[tuple[str, set[int]]] = []
    notes = _readings(trace)
    for node in source.graph.nodes:
        own = {trace.graph.views[name].tensor for name in node.inputs if name in trace.graph.views}
        for place in (place for place in notes.get(node.name, {}) if place[0] in own):
            indices = [index for those in read.get(place, {}).values() for index in those]
            if indices and not fold(source, trace, node, place=place, indices=indices, weights=weights):
                blocked.append((place[0], set(read[place])))
    return weights, blocked


def _readings(trace: Trace) -> dict[str, dict[tuple[str, int], None]]:
    """Return the axes of kernels on which operations read channels, by the name of the operation, each once."""
    found: dict[str, dict[tuple[str, int], None]] = {}
    for note in trace.notes:
        if note.part is Part.IN and note.labels.any():
            found.setdefault(note.node, {})[note.tensor, note.axis] = None
    return found
