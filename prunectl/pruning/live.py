"""Masks for weights that are in memory: the same plan and the same cuts as for those in a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from prunectl.formats.base import Array, ModelFile, Storage, Tensor
from prunectl.pruning.execute import Method, makers
from prunectl.pruning.plan import Choice, Cut, Plan
from prunectl.pruning.selection import Mask
from prunectl.pruning.together import scored


def kept(model: ModelFile, plan: Plan, method: Method, choice: Choice, weights: Mapping[str, Array]) -> dict[str, Mask]:
    """Return for each tensor of a plan which of its weights stay."""
    held = replace(model, decode=lambda tensor: weights[tensor.name])
    cuts = tuple(Cut(_in_memory(cut.tensor, weights[cut.tensor.name]), cut.drop) for cut in plan.cuts)
    method, _ = scored(held, replace(choice, tensors=tuple(cut.tensor for cut in cuts)), method)
    made = makers(held, replace(plan, cuts=cuts), method)
    masks = {}
    for cut, make in zip(cuts, made, strict=True):
        dropped = [np.array(gone).reshape(-1) for _, gone in make()]
        masks[cut.tensor.name] = ~np.concatenate(dropped).reshape(cut.tensor.shape)
    return masks


def _in_memory(tensor: Tensor, array: Array) -> Tensor:
    # Cutting zeroes blocks where they may be written to, which these are not to suffer.
    array.setflags(write=False)
    return replace(
        tensor,
        storage=Storage(tensor.name, array.nbytes, None, array.nbytes),
        dtype=array.dtype,
        start=0,
        strides=None,
    )
