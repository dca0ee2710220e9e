"""Matching of the tensors of two models by name, or by layer and role, and a paired walk through them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any

import numpy as np

from prunectl.analysis.tensor_io import is_contiguous, nonzero_mask, storage_numel
from prunectl.errors import InputError
from prunectl.formats import budgets, extents
from prunectl.formats.base import WEIGHTS, Array, ModelFile, Role, Tensor
from prunectl.formats.extents import Extent

Axes = tuple[int, ...] | None
"""The order of axes to see a tensor in; None as it is."""


@dataclass(frozen=True, slots=True)
class TensorView:
    """A tensor of a model, its axes in some order."""

    model: ModelFile
    tensor: Tensor
    axes: Axes = None

    def pieces(self, length: int) -> Iterator[Array]:
        """Yield its elements in C order, so many at a time; flat ones are never all in memory."""
        tensor = self.tensor
        if tensor.size > storage_numel(tensor) * budgets.MAX_REPEATS:
            raise InputError(f"{self.model.path} is refused: {tensor.name} repeats what it stores {tensor.size} times")
        if self.axes is None and is_contiguous(tensor):
            yield from map(
                partial(_read_flat, tensor), range(0, tensor.size, length), _chunk_lengths(tensor.size, length)
            )
            return
        array = self.model.read(tensor)
        flat = np.ascontiguousarray(array if self.axes is None else array.transpose(self.axes)).reshape(-1)
        for begin in range(0, flat.size, length):
            yield flat[begin : begin + length]


def iter_paired_chunks(left: TensorView, right: TensorView) -> Iterator[tuple[Array, Array]]:
    """Yield pieces of both, the same elements at the same time."""
    widest = max(left.tensor.dtype.itemsize, right.tensor.dtype.itemsize)
    length = max(extents.BLOCK_BYTES // widest, 1)
    yield from zip(left.pieces(length), right.pieces(length), strict=True)


@dataclass(frozen=True, slots=True)
class ElementChanges:
    """How many elements of a tensor differ from those of another: in their bits, but minus zero is zero."""

    changed: int = 0
    kept_changed: int = 0
    """Of those that are zero in neither."""
    zeros_added: int = 0
    zeros_lost: int = 0


def count_changes(new: TensorView, old: TensorView) -> ElementChanges:
    """Counts over a paired walk through two tensors of one shape."""
    changed = kept_changed = zeros_added = zeros_lost = 0
    for now, then in iter_paired_chunks(new, old):
        kept, had = nonzero_mask(now), nonzero_mask(then)
        # Pruning that multiplies by a mask leaves -0.0 where other pruning leaves 0.0: the same number.
        differs = bitwise_differs(now, then) & (kept | had)
        changed += int(np.count_nonzero(differs))
        kept_changed += int(np.count_nonzero(kept & had & differs))
        zeros_added += int(np.count_nonzero(had & ~kept))
        zeros_lost += int(np.count_nonzero(kept & ~had))
    return ElementChanges(changed, kept_changed, zeros_added, zeros_lost)


def bitwise_differs(left: Array, right: Array) -> Any:
    """Mark elements that are not the same: to the bit within a type, else in the narrower of the two."""
    if left.dtype != right.dtype:
        narrow = min(left.dtype, right.dtype, key=lambda dtype: dtype.itemsize)
        with np.errstate(over="ignore", invalid="ignore"):
            left, right = left.astype(narrow), right.astype(narrow)
    width = left.dtype.itemsize
    if width in {1, 2, 4, 8}:
        return left.view(f"u{width}") != right.view(f"u{width}")
    return (left.view(np.uint8) != right.view(np.uint8)).reshape(-1, width).any(axis=1)


def _chunk_lengths(size: int, length: int) -> Iterator[int]:
    return (min(length, size - begin) for begin in range(0, size, length))


def _read_flat(tensor: Tensor, begin: int, length: int) -> Array:
    extent = tensor.storage.extent
    assert extent is not None
    width = tensor.dtype.itemsize
    run = Extent(extent.path, extent.offset + (tensor.start + begin) * width, length * width)
    blocks = [block.copy() for block in extents.blocks(run, tensor.dtype)]
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


_DEVICE = re.compile(r":\d+$")
_SEPARATORS = re.compile(r"[./;:]")
_ROLE_ALIASES = {
    "gamma": "weight",
    "kernel": "weight",
    "embeddings": "weight",
    "recurrent_kernel": "recurrent",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
"""What frameworks call the same part of a layer."""


class MatchKind(StrEnum):
    """How two tensors were matched."""

    NAME = "name"
    LAYER = "layer"
    TRANSPOSED = "layer, axes reordered"


@dataclass(frozen=True, slots=True)
class Pair:
    """Matched tensors of the new and the old model."""

    new: Tensor
    old: Tensor
    match_kind: MatchKind
    axes: Axes = None
    """The order in which the old one has the axes of the new."""


@dataclass(frozen=True, slots=True)
class Pairing:
    """Matched pairs, and tensors without a counterpart."""

    pairs: tuple[Pair, ...]
    added: tuple[Tensor, ...]
    removed: tuple[Tensor, ...]


def match_tensors(new: Sequence[Tensor], old: Sequence[Tensor]) -> Pairing:
    """Match tensors by name, then by layer path and role where that is unambiguous."""
    was = {tensor.name: tensor for tensor in old}
    pairs_by_name = {tensor.name: _pair_by_name(tensor, was.pop(tensor.name)) for tensor in new if tensor.name in was}
    rest = [tensor for tensor in new if tensor.name not in pairs_by_name]
    # What all layers of a model share says nothing of any of them.
    candidates, originals = (
        _group_by_path_and_role(rest, _common_prefix_length(new)),
        _group_by_path_and_role(was.values(), _common_prefix_length(old)),
    )
    for part, new_tensors in candidates.items():
        old_tensors = originals.get(part, [])
        if (
            len(new_tensors) == len(old_tensors) == 1
            and (pair := _pair_by_layer(new_tensors[0], old_tensors[0])) is not None
        ):
            pairs_by_name[pair.new.name] = pair
            del was[pair.old.name]
    pairs = tuple(pairs_by_name[tensor.name] for tensor in new if tensor.name in pairs_by_name)
    return Pairing(pairs, tuple(tensor for tensor in rest if tensor.name not in pairs_by_name), tuple(was.values()))


def axis_permutation(new: Tensor, old: Tensor) -> Axes:
    """The permutation from a new kernel's axes to an old one's; None where it is unknown."""
    theirs, ours = _canonical_axes(old), _canonical_axes(new)
    if theirs is None or ours is None:
        return None
    axes = tuple(theirs[ours.index(axis)] for axis in range(len(ours)))
    return axes if tuple(old.shape[axis] for axis in axes) == new.shape else None


def _pair_by_name(new: Tensor, old: Tensor) -> Pair:
    """Tensors of one name as a pair; their axes are moved only where their shapes say so, too."""
    axes = axis_permutation(new, old) if new.shape != old.shape and len(new.shape) == len(old.shape) else None
    return Pair(new, old, MatchKind.NAME, axes)


def _pair_by_layer(new: Tensor, old: Tensor) -> Pair | None:
    # The axes say more than the shape: a square kernel has the same shape either way.
    axes = axis_permutation(new, old) if len(new.shape) == len(old.shape) >= 2 else None
    if axes is not None and axes != tuple(range(len(axes))):
        return Pair(new, old, MatchKind.TRANSPOSED, axes)
    same_layout = axes is not None or len(new.shape) < 2 or (new.out_axis, old.out_axis) == (None, None)
    return Pair(new, old, MatchKind.LAYER) if new.shape == old.shape and same_layout else None


def _canonical_axes(tensor: Tensor) -> tuple[int, ...] | None:
    """Its axes with outputs first, inputs second, and the others in their order."""
    first, second = tensor.out_axis, tensor.reduction_axis
    if first is None or second is None or first == second:
        return None
    return (first, second, *(axis for axis in range(len(tensor.shape)) if axis not in {first, second}))


def _group_by_path_and_role(tensors: Iterable[Tensor], shared: int) -> dict[tuple[str, ...], list[Tensor]]:
    groups: defaultdict[tuple[str, ...], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        path = _path(tensor)
        groups[(_role_key(tensor), *(path[shared:] if tensor.role in WEIGHTS else path))].append(tensor)
    return groups


def _common_prefix_length(tensors: Iterable[Tensor]) -> int:
    """With how many steps the paths of all layers begin alike, such as the name of the model."""
    paths = [_path(tensor) for tensor in tensors if tensor.role in WEIGHTS]
    if not paths:
        return 0
    most = min(map(len, paths)) - 1
    return next((step for step in range(most) if len({path[step] for path in paths}) > 1), max(most, 0))


def _path(tensor: Tensor) -> tuple[str, ...]:
    """The layer as every framework would call it."""
    return tuple(filter(None, _SEPARATORS.split(tensor.layer.lower())))


def _role_key(tensor: Tensor) -> str:
    if tensor.role is Role.ROUTER:
        # A graph says nothing but that it is multiplied by.
        return str(Role.KERNEL)
    if tensor.role in {Role.KERNEL, Role.BIAS, Role.RECURRENT, Role.EMBEDDING}:
        # Not by its name, which a compiler may have made of several operations.
        return str(tensor.role)
    last = _SEPARATORS.split(_DEVICE.sub("", tensor.name).lower())[-1]
    return f"{tensor.role} {_ROLE_ALIASES.get(last, last)}"
