"""How large is what comes out of each channel of a tensor, over some data and before any activation function?"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from prunectl.calibrating import scores
from prunectl.calibrating.bias import bias_of
from prunectl.calibrating.calibration import Calibration
from prunectl.calibrating.columns import by_group, matrix
from prunectl.calibrating.moments import Sums, Wide
from prunectl.calibrating.opening import opened
from prunectl.formats.base import Array, ModelFile, Role, Tensor
from prunectl.pruning.request import Request
from prunectl.training.sights import Sight, Use


@dataclass(frozen=True, slots=True)
class Outputs:
    """What comes out of a tensor: a number for each output, in the order in which they come out."""

    sizes: Wide
    """The mean |output|."""
    squares: Wide
    """The sum of the squares."""
    counts: NDArray[np.int64]
    """How often each was seen: the examples, times the positions in each."""
    bias: str = ""
    """Name of the bias that is counted in; none if the file does not tell it clearly."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What came out of the tensors of a model, and what a user should know about how it was run."""

    outputs: Mapping[str, Outputs]
    """By the name of the tensor; none of those whose outputs cannot all be seen."""
    notes: tuple[str, ...]


def seen_outputs(model: ModelFile, names: Collection[str], request: Request, *, is_trusted: bool = False) -> Seen:
    """Run the data of a request through a model, and return what comes out of some of its tensors."""
    found = opened(model, request, is_trusted=is_trusted, needs_targets=False, has_reference=False)
    with closing(found):
        wanted = [tensor for tensor in model.tensors if tensor.name in names]
        return Seen(outputs(model, wanted, found.calibration), found.notes)


def output_norms(
    model: ModelFile, names: Collection[str], request: Request, *, norm: str = "1", is_trusted: bool = False
) -> dict[str, Wide]:
    """Return the mean |output| of every channel, or where the norm is 2 the root of the mean square."""
    found = seen_outputs(model, names, request, is_trusted=is_trusted).outputs
    if norm == "1":
        return {name: one.sizes for name, one in found.items()}
    return {name: np.sqrt(one.squares / one.counts) for name, one in found.items()}


def outputs(model: ModelFile, tensors: Sequence[Tensor], calibration: Calibration) -> dict[str, Outputs]:
    """Return what comes out of tensors, added up batch by batch; none of those whose outputs cannot all be seen."""
    biases = {tensor.name: bias for tensor in tensors if (bias := _bias(model, tensor)) is not None}
    weights = {tensor.name: model.read(tensor) for tensor in tensors}
    added = {name: model.read(bias) for name, bias in biases.items()}
    sums = calibration.sums(tensors, partial(sizes_and_squares, weights, added))
    return {
        tensor.name: _gathered(weights[tensor.name], sums[tensor.name], biases.get(tensor.name))
        for tensor in tensors
        if tensor.name in sums and scores.is_covered(tensor.shape, sums[tensor.name])
    }


def sizes_and_squares(
    weights: Mapping[str, Array], biases: Mapping[str, Array], sight: Sight, kernel: tuple[int, ...]
) -> tuple[Wide, int]:
    """Return the sums of |output| and of its square, as those two by groups by outputs.

    Worked out from the inputs, so that they mean the same in every framework: some show only what an activation
    function has made of them, or what they are before a bias.
    """
    rows = matrix(weights[sight.name], sight.use).astype(np.float32)
    bias = _of_part(biases[sight.name], sight.use).astype(np.float32) if sight.name in biases else np.zeros(1, "f4")
    found, positions = np.zeros((2, *rows.shape[:2])), 0
    for inputs in by_group(sight.inputs, sight.use, kernel, len(rows) * rows.shape[1]):
        made = np.matmul(inputs, rows.transpose(0, 2, 1)) + bias
        found[0] += np.abs(made).sum(axis=1, dtype=np.float64)
        found[1] += np.square(made, out=made).sum(axis=1, dtype=np.float64)
        positions += inputs.shape[1]
    return found, positions


def _bias(model: ModelFile, tensor: Tensor) -> Tensor | None:
    """Return the bias of what a tensor makes of inputs; what it makes of states is a part of a sum that has one."""
    return bias_of(model, tensor) if tensor.role is not Role.RECURRENT else None


def _of_part(bias: Array, use: Use) -> Array:
    """Return a bias as groups by one by outputs."""
    return bias.reshape(use.groups, 1, -1)[..., slice(*use.outputs) if use.outputs is not None else slice(None)]


def _gathered(weights: Array, sums: Sums, bias: Tensor | None) -> Outputs:
    """Return sums over parts of the outputs as one."""
    whole = replace(next(iter(sums.uses.values())), outputs=None)
    groups, each = matrix(weights, whole).shape[:2]
    totals, counts = np.zeros((2, groups, each)), np.zeros((groups, each), np.int64)
    for part, total in sums.totals.items():
        at = slice(*part) if part is not None else slice(None)
        totals[..., at] += total
        counts[:, at] += sums.counts[part]
    sizes, squares = totals.reshape(2, -1)
    flat = counts.reshape(-1)
    return Outputs(sizes / flat, squares, flat, bias.name if bias is not None else "")
