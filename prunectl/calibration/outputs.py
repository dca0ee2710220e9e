"""Output statistics: mean magnitude of each output channel over calibration data, before the activation function."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from prunectl.calibration import statistics
from prunectl.calibration.im2col import im2col_by_group, weight_matrix
from prunectl.calibration.reconstruct import bias_of
from prunectl.calibration.session import BlockwiseCalibration, Calibration, open_calibration
from prunectl.calibration.statistics import Float64Array, InputStatistics
from prunectl.errors import UsageError
from prunectl.formats.base import Array, ModelFile, Role, Tensor
from prunectl.pruning.request import PruneRequest
from prunectl.training.backend import LayerInput, WeightUse


@dataclass(frozen=True, slots=True)
class OutputStatistics:
    """Statistics of a layer's outputs, one number for each output channel."""

    mean_abs: Float64Array
    """The mean |output|."""
    sum_squares: Float64Array
    """The sum of the squares."""
    counts: NDArray[np.int64]
    """How many outputs each channel had: examples times positions."""
    bias: str = ""
    """Name of the bias that the outputs include; empty if the layer has none, or it is not clear which."""


@dataclass(frozen=True, slots=True)
class CollectedOutputs:
    """Output statistics of a model's tensors, and notes for the user."""

    outputs: Mapping[str, OutputStatistics]
    """By the name of the tensor, without tensors of which not all outputs are observed."""
    notes: tuple[str, ...]


def collect_outputs(
    model: ModelFile, names: Collection[str], request: PruneRequest, *, is_trusted: bool = False
) -> CollectedOutputs:
    """Run the calibration data of a request through a model; return the output statistics of some tensors."""
    session = open_calibration(model, request, is_trusted=is_trusted, needs_targets=False, has_reference=False)
    with closing(session):
        tensors = [tensor for tensor in model.tensors if tensor.name in names]
        return CollectedOutputs(output_statistics(model, tensors, session.calibration), session.notes)


def block_influence(
    model: ModelFile, request: PruneRequest, *, is_trusted: bool = False
) -> tuple[list[float], tuple[str, ...]]:
    """Run the calibration data of a request through a model folder; return the influence of each block, and notes."""
    session = open_calibration(
        model, request, is_trusted=is_trusted, needs_targets=False, has_reference=False, is_blockwise=True
    )
    with closing(session):
        if not isinstance(session.calibration, BlockwiseCalibration):
            raise UsageError(f"the blocks of {model.folder} cannot be run one by one", hint="name them: --layers 20-23")
        return session.calibration.influence(), session.notes


def output_norms(
    model: ModelFile, names: Collection[str], request: PruneRequest, *, norm: str = "1", is_trusted: bool = False
) -> dict[str, Float64Array]:
    """The mean |output| of every channel (norm 1), or the root mean square (norm 2)."""
    statistics = collect_outputs(model, names, request, is_trusted=is_trusted).outputs
    if norm == "1":
        return {name: output.mean_abs for name, output in statistics.items()}
    return {name: np.sqrt(output.sum_squares / output.counts) for name, output in statistics.items()}


def output_statistics(
    model: ModelFile, tensors: Sequence[Tensor], calibration: Calibration
) -> dict[str, OutputStatistics]:
    """Output statistics, accumulated batch by batch, of the tensors whose outputs are all observed."""
    biases = {tensor.name: bias for tensor in tensors if (bias := _bias(model, tensor)) is not None}
    weights = {tensor.name: model.read(tensor) for tensor in tensors}
    added = {name: model.read(bias) for name, bias in biases.items()}
    sums = calibration.accumulate(tensors, partial(sum_abs_and_squares, weights, added))
    return {
        tensor.name: _merge_parts(weights[tensor.name], sums[tensor.name], biases.get(tensor.name))
        for tensor in tensors
        if tensor.name in sums and statistics.covers_all_outputs(tensor.shape, sums[tensor.name])
    }


def sum_abs_and_squares(
    weights: Mapping[str, Array], biases: Mapping[str, Array], layer: LayerInput, kernel: tuple[int, ...]
) -> tuple[Float64Array, int]:
    """The sums of |output| and of its square: an array of two by groups by outputs.

    The outputs are computed from the inputs, so that they mean the same in every framework: some expose only the
    outputs after the activation function, or before the bias.
    """
    rows = weight_matrix(weights[layer.name], layer.use).astype(np.float32)
    bias = _bias_part(biases[layer.name], layer.use).astype(np.float32) if layer.name in biases else np.zeros(1, "f4")
    totals, positions = np.zeros((2, *rows.shape[:2])), 0
    for inputs in im2col_by_group(layer.inputs, layer.use, kernel, len(rows) * rows.shape[1]):
        activations = np.matmul(inputs, rows.transpose(0, 2, 1)) + bias
        totals[0] += np.abs(activations).sum(axis=1, dtype=np.float64)
        totals[1] += np.square(activations, out=activations).sum(axis=1, dtype=np.float64)
        positions += inputs.shape[1]
    return totals, positions


def _bias(model: ModelFile, tensor: Tensor) -> Tensor | None:
    """The bias of a tensor; None for a recurrent kernel, whose product is added to one that has the bias already."""
    return bias_of(model, tensor) if tensor.role is not Role.RECURRENT else None


def _bias_part(bias: Array, use: WeightUse) -> Array:
    """The bias of a use's outputs as groups by one by outputs, to be added to outputs by position."""
    return bias.reshape(use.groups, 1, -1)[..., slice(*use.outputs) if use.outputs is not None else slice(None)]


def _merge_parts(weights: Array, sums: InputStatistics, bias: Tensor | None) -> OutputStatistics:
    """Merge sums over parts of the outputs."""
    use = replace(next(iter(sums.uses.values())), outputs=None)
    groups, each = weight_matrix(weights, use).shape[:2]
    totals, counts = np.zeros((2, groups, each)), np.zeros((groups, each), np.int64)
    for part, total in sums.totals.items():
        part_outputs = slice(*part) if part is not None else slice(None)
        totals[..., part_outputs] += total
        counts[:, part_outputs] += sums.counts[part]
    magnitudes, squares = totals.reshape(2, -1)
    flat = counts.reshape(-1)
    return OutputStatistics(magnitudes / flat, squares, flat, bias.name if bias is not None else "")
