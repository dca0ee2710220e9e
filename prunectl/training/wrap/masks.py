"""Masks beside the weights of a state dict: which tensors get one, when several see the same numbers?"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from prunectl.errors import InputError
from prunectl.formats.base import Array, ModelFile, Tensor
from prunectl.pruning.selection import Mask

ORIGINAL, MASK = "_orig", "_mask"
"""What torch.nn.utils.prune adds to the name of a weight."""


def masked(model: ModelFile, masks: Mapping[str, Mask]) -> dict[str, Array]:
    """Return the masks of all tensors that need one, as numbers of the type of their weight."""
    known = {tensor.name: tensor for tensor in model.tensors}
    found: dict[str, Array] = {}
    by_place = {_place(known[name]): name for name in masks}
    by_storage: dict[str, str] = {known[name].storage.key: name for name in masks}
    for tensor in model.tensors:
        name = by_place.get(_place(tensor))
        if name is not None:
            found[tensor.name] = np.ascontiguousarray(masks[name]).astype(tensor.dtype)
        elif tensor.storage.key in by_storage:
            raise InputError(
                f"{tensor.name} of {model.path} shares some numbers with {by_storage[tensor.storage.key]}, "
                "and a mask would part them",
                hint="prune without --wrap, or leave it out with --exclude",
            )
    taken = {tensor.name for tensor in model.tensors}
    for name in found:
        for new in (name + ORIGINAL, name + MASK):
            if new in taken:
                raise InputError(f"{model.path} holds a {new} of its own, beside {name}")
    return found


def _place(tensor: Tensor) -> object:
    return (tensor.storage.key, tensor.start, tensor.shape, tensor.strides, tensor.dtype)
