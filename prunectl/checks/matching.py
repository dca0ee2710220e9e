"""Matching of the tensors of two models by name, or by layer and role, and element-wise comparison of the pairs."""

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
"""Permutation of the axes of a tensor; None keeps their order."""


@dataclass(frozen=True, slots=True)
class TensorView:
    """A tensor of a model, with its axes permuted."""

    model: ModelFile
    tensor: Tensor
    axes: Axes = None

    def pieces(self, length: int) -> Iterator[Array]:
        """Yield the elements in C order, `length` at a time; a contiguous tensor is never in memory as a whole."""
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
    """Yield pairs of chunks with the same elements of both tensors."""
    widest = max(left.tensor.dtype.itemsize, right.tensor.dtype.itemsize)
    length = max(extents.BLOCK_BYTES // widest, 1)
    yield from zip(left.pieces(length), right.pieces(length), strict=True)


@dataclass(frozen=True, slots=True)
class ElementChanges:
    """Numbers of elements whose bits differ between two tensors; minus zero counts as zero."""

    changed: int = 0
    kept_changed: int = 0
    """Changed elements that are zero in neither tensor."""
    zeros_added: int = 0
    zeros_lost: int = 0


def count_changes(new: TensorView, old: TensorView) -> ElementChanges:
    """Count the differences of two tensors of one shape, chunk by chunk."""
    changed = kept_changed = zeros_added = zeros_lost = 0
    for now, then in iter_paired_chunks(new, old):
        is_nonzero, was_nonzero = nonzero_mask(now), nonzero_mask(then)
        # Pruning by multiplication with a mask leaves -0.0, and other pruning leaves 0.0: these are equal.
        differs = bitwise_differs(now, then) & (is_nonzero | was_nonzero)
        changed += int(np.count_nonzero(differs))
        kept_changed += int(np.count_nonzero(is_nonzero & was_nonzero & differs))
        zeros_added += int(np.count_nonzero(was_nonzero & ~is_nonzero))
        zeros_lost += int(np.count_nonzero(is_nonzero & ~was_nonzero))
    return ElementChanges(changed, kept_changed, zeros_added, zeros_lost)


def bitwise_differs(left: Array, right: Array) -> Any:
    """Mask of elements whose bits differ; if the dtypes differ, both are cast to the narrower one first."""
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
"""Common names for parts of a layer that frameworks name differently."""


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
    """Permutation of the old tensor's axes into the order of the new one's; None if they keep their order."""


@dataclass(frozen=True, slots=True)
class Pairing:
    """Matched pairs, and tensors without a counterpart."""

    pairs: tuple[Pair, ...]
    added: tuple[Tensor, ...]
    removed: tuple[Tensor, ...]


def match_tensors(new: Sequence[Tensor], old: Sequence[Tensor]) -> Pairing:
    """Match tensors by name, then by layer path and role where that is unambiguous."""
    olds = {tensor.name: tensor for tensor in old}
    pairs_by_name = {tensor.name: _pair_by_name(tensor, olds.pop(tensor.name)) for tensor in new if tensor.name in olds}
    rest = [tensor for tensor in new if tensor.name not in pairs_by_name]
    # The path prefix that all layers of a model share is ignored.
    candidates, originals = (
        _group_by_path_and_role(rest, _common_prefix_length(new)),
        _group_by_path_and_role(olds.values(), _common_prefix_length(old)),
    )
    for part, new_tensors in candidates.items():
        old_tensors = originals.get(part, [])
        if (
            len(new_tensors) == len(old_tensors) == 1
            and (pair := _pair_by_layer(new_tensors[0], old_tensors[0])) is not None
        ):
            pairs_by_name[pair.new.name] = pair
            del olds[pair.old.name]
    pairs = tuple(pairs_by_name[tensor.name] for tensor in new if tensor.name in pairs_by_name)
    return Pairing(pairs, tuple(tensor for tensor in rest if tensor.name not in pairs_by_name), tuple(olds.values()))


def axis_permutation(new: Tensor, old: Tensor) -> Axes:
    """The permutation of an old kernel's axes into the order of a new one's; None if it is unknown."""
    old_axes, new_axes = _canonical_axes(old), _canonical_axes(new)
    if old_axes is None or new_axes is None:
        return None
    axes = tuple(old_axes[new_axes.index(axis)] for axis in range(len(new_axes)))
    return axes if tuple(old.shape[axis] for axis in axes) == new.shape else None


def _pair_by_name(new: Tensor, old: Tensor) -> Pair:
    """Pair tensors of the same name; axes are only permuted if the shapes differ, and fit after the permutation."""
    axes = axis_permutation(new, old) if new.shape != old.shape and len(new.shape) == len(old.shape) else None
    return Pair(new, old, MatchKind.NAME, axes)


def _pair_by_layer(new: Tensor, old: Tensor) -> Pair | None:
    # Axes are checked before the shape, because a square kernel has the same shape in either order.
    axes = axis_permutation(new, old) if len(new.shape) == len(old.shape) >= 2 else None
    if axes is not None and axes != tuple(range(len(axes))):
        return Pair(new, old, MatchKind.TRANSPOSED, axes)
    same_layout = axes is not None or len(new.shape) < 2 or (new.out_axis, old.out_axis) == (None, None)
    return Pair(new, old, MatchKind.LAYER) if new.shape == old.shape and same_layout else None


def _canonical_axes(tensor: Tensor) -> tuple[int, ...] | None:
    """The axes of a tensor: outputs first, inputs second, then the others; None if they are unknown."""
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
    """Length of the prefix that the paths of all layers share, such as the name of the model."""
    paths = [_path(tensor) for tensor in tensors if tensor.role in WEIGHTS]
    if not paths:
        return 0
    longest = min(map(len, paths)) - 1
    return next((step for step in range(longest) if len({path[step] for path in paths}) > 1), max(longest, 0))


def _path(tensor: Tensor) -> tuple[str, ...]:
    """The layer's name as a lowercase path, independent of the framework's separators."""
    return tuple(filter(None, _SEPARATORS.split(tensor.layer.lower())))


def _role_key(tensor: Tensor) -> str:
    if tensor.role is Role.ROUTER:
        # A graph does not show that a kernel is a router, so routers are matched as kernels.
        return str(Role.KERNEL)
    if tensor.role in {Role.KERNEL, Role.BIAS, Role.RECURRENT, Role.EMBEDDING}:
        # The name is not used, because a compiler may have composed it from several operations.
        return str(tensor.role)
    last = _SEPARATORS.split(_DEVICE.sub("", tensor.name).lower())[-1]
    return f"{tensor.role} {_ROLE_ALIASES.get(last, last)}"
