"""Which tensor of one model is which of another? By name, or by layer and shape where only one can be meant."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from prunectl.formats.base import WEIGHTS, Role, Tensor
from prunectl.gating.lockstep import Axes

_DEVICE = re.compile(r":\d+$")
_SEPARATORS = re.compile(r"[./;:]")
_PARTS = {
    "gamma": "weight",
    "kernel": "weight",
    "embeddings": "weight",
    "recurrent_kernel": "recurrent",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
"""What frameworks call the same part of a layer."""


class How(StrEnum):
    """Why two tensors are taken for the same."""

    NAME = "name"
    LAYER = "layer"
    TRANSPOSED = "layer, axes moved"


@dataclass(frozen=True, slots=True)
class Pair:
    """A tensor, and what it was."""

    new: Tensor
    old: Tensor
    how: How
    axes: Axes = None
    """The order in which the old one has the axes of the new."""


@dataclass(frozen=True, slots=True)
class Pairing:
    """What belongs together, and what has no counterpart."""

    pairs: tuple[Pair, ...]
    added: tuple[Tensor, ...]
    gone: tuple[Tensor, ...]


def pairing(new: Sequence[Tensor], old: Sequence[Tensor]) -> Pairing:
    """Return which tensor was which: first those of one name, then what only one can be meant by."""
    was = {tensor.name: tensor for tensor in old}
    found = {tensor.name: _named(tensor, was.pop(tensor.name)) for tensor in new if tensor.name in was}
    rest = [tensor for tensor in new if tensor.name not in found]
    # What all layers of a model share says nothing of any of them.
    candidates, originals = _by_part(rest, _shared(new)), _by_part(was.values(), _shared(old))
    for part, here in candidates.items():
        there = originals.get(part, [])
        if len(here) == len(there) == 1 and (pair := _alike(here[0], there[0])) is not None:
            found[pair.new.name] = pair
            del was[pair.old.name]
    pairs = tuple(found[tensor.name] for tensor in new if tensor.name in found)
    return Pairing(pairs, tuple(tensor for tensor in rest if tensor.name not in found), tuple(was.values()))


def moved(new: Tensor, old: Tensor) -> Axes:
    """Return the order in which an old kernel has the axes of a new one; None where it cannot be known."""
    theirs, ours = _canonical(old), _canonical(new)
    if theirs is None or ours is None:
        return None
    axes = tuple(theirs[ours.index(axis)] for axis in range(len(ours)))
    return axes if tuple(old.shape[axis] for axis in axes) == new.shape else None


def _named(new: Tensor, old: Tensor) -> Pair:
    """Return tensors of one name as a pair; their axes are moved only where their shapes say so, too."""
    axes = moved(new, old) if new.shape != old.shape and len(new.shape) == len(old.shape) else None
    return Pair(new, old, How.NAME, axes)


def _alike(new: Tensor, old: Tensor) -> Pair | None:
    # The axes say more than the shape: a square kernel has the same shape either way.
    axes = moved(new, old) if len(new.shape) == len(old.shape) >= 2 else None
    if axes is not None and axes != tuple(range(len(axes))):
        return Pair(new, old, How.TRANSPOSED, axes)
    same_layout = axes is not None or len(new.shape) < 2 or (new.out_axis, old.out_axis) == (None, None)
    return Pair(new, old, How.LAYER) if new.shape == old.shape and same_layout else None


def _canonical(tensor: Tensor) -> tuple[int, ...] | None:
    """Return its axes with outputs first, inputs second, and the others in their order."""
    first, second = tensor.out_axis, tensor.inputs_axis
    if first is None or second is None or first == second:
        return None
    return (first, second, *(axis for axis in range(len(tensor.shape)) if axis not in {first, second}))


def _by_part(tensors: Iterable[Tensor], shared: int) -> dict[tuple[str, ...], list[Tensor]]:
    found: defaultdict[tuple[str, ...], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        path = _path(tensor)
        found[(_part(tensor), *(path[shared:] if tensor.role in WEIGHTS else path))].append(tensor)
    return found


def _shared(tensors: Iterable[Tensor]) -> int:
    """Return with how many steps the paths of all layers begin alike, such as the name of the model."""
    paths = [_path(tensor) for tensor in tensors if tensor.role in WEIGHTS]
    if not paths:
        return 0
    most = min(map(len, paths)) - 1
    return next((step for step in range(most) if len({path[step] for path in paths}) > 1), max(most, 0))


def _path(tensor: Tensor) -> tuple[str, ...]:
    """Return the layer as every framework would call it."""
    return tuple(filter(None, _SEPARATORS.split(tensor.layer.lower())))


def _part(tensor: Tensor) -> str:
    if tensor.role in {Role.KERNEL, Role.BIAS, Role.RECURRENT, Role.EMBEDDING}:
        # Not by its name, which a compiler may have made of several operations.
        return str(tensor.role)
    last = _SEPARATORS.split(_DEVICE.sub("", tensor.name).lower())[-1]
    return f"{tensor.role} {_PARTS.get(last, last)}"
