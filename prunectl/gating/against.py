"""Is a pruned file its source with zeros added, and nothing else?"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass

import numpy as np

from prunectl.errors import PrunectlError, attempt
from prunectl.formats.base import Can, ModelFile, Tensor
from prunectl.formats.table import by_name, load
from prunectl.gating.lockstep import Seen, differ, lockstep
from prunectl.measuring.meter import Meter, unwatched
from prunectl.measuring.zeros import nonzero


@dataclass(frozen=True, slots=True)
class Held:
    """What was found of something that must be nothing."""

    id: str
    metric: str
    actual: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class _Tally:
    """What is not as it must be in a tensor."""

    other: int
    """Kept weights that are not what they were, to the bit."""
    lost: int
    """Zeros that are none any more."""
    gained: int


def against(
    model: ModelFile, source: ModelFile, cuts: Container[str] | None = None, meter: Meter = unwatched
) -> tuple[list[Held], dict[str, int]]:
    """Return what differs, and the zeros added by tensor; with cuts, zeros may be added to these alone."""
    pairs = _pairs(model, source)
    tallies = {}
    with meter("comparing", sum(tensor.nbytes for tensor, _ in pairs)) as bar:
        for tensor, was in pairs:
            tallies[tensor.name] = _tally(model, tensor, source, was)
            bar.advance(tensor.nbytes)
    found = [
        Held("architecture", "differences", *_told(list(_architecture(model, source)))),
        Held("kept-weights", "weights_changed", *_sum({name: one.other for name, one in tallies.items()})),
        Held("kept-zeros", "zeros_lost", *_sum({name: one.lost for name, one in tallies.items()})),
    ]
    if cuts is not None:
        strange = {name: one.gained for name, one in tallies.items() if name not in cuts and name not in model.copies}
        found.append(Held("other-tensors", "zeros_gained", *_sum(strange)))
    return found, {name: one.gained for name, one in tallies.items()}


def _pairs(model: ModelFile, source: ModelFile) -> list[tuple[Tensor, Tensor]]:
    was = {tensor.name: tensor for tensor in source.tensors}
    pairs = ((tensor, was.get(tensor.name)) for tensor in model.tensors)
    return [(tensor, old) for tensor, old in pairs if old is not None and _kind(tensor) == _kind(old)]


def _kind(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.dtype


def _tally(model: ModelFile, tensor: Tensor, source: ModelFile, was: Tensor) -> _Tally:
    other = lost = gained = 0
    for now, then in lockstep(Seen(model, tensor), Seen(source, was)):
        kept, had = nonzero(now), nonzero(then)
        other += int(np.count_nonzero(kept & had & differ(now, then)))
        lost += int(np.count_nonzero(kept & ~had))
        gained += int(np.count_nonzero(had & ~kept))
    return _Tally(other, lost, gained)


def _architecture(model: ModelFile, source: ModelFile) -> Iterator[str]:
    """Yield what is built in another way."""
    if model.format != source.format:
        yield f"the format is {model.format}, and was {source.format}"
    is_kind = {tensor.name: _kind(tensor) for tensor in model.tensors}
    was_kind = {tensor.name: _kind(tensor) for tensor in source.tensors}
    for name in dict.fromkeys((*was_kind, *is_kind)):
        if name not in is_kind:
            yield f"{name} is gone"
        elif name not in was_kind:
            yield f"{name} is new"
        elif is_kind[name] != was_kind[name]:
            yield f"{name} has another shape or type"
    if model.about.keras != source.about.keras:
        yield "the configuration of Keras is another"
    if model.format == source.format and Can.FLOPS & by_name(model.format).can:
        # A file without a graph has none before and after.
        here, there = (attempt(load(by_name(one.format).graph), one) for one in (model, source))
        if not (here == there or (isinstance(here, PrunectlError) and isinstance(there, PrunectlError))):
            yield "the graph has other operations"


def _told(differences: list[str]) -> tuple[int, str]:
    return len(differences), f"The first: {differences[0]}." if differences else ""


def _sum(counts: dict[str, int]) -> tuple[int, str]:
    first = next((f"The first: {name} has {count}." for name, count in counts.items() if count), "")
    return sum(counts.values()), first
