"""Layer-wise reconstruction: the kept weights are refitted by least squares to the outputs of the dense layer."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from prunectl.analysis.patterns import NMPattern
from prunectl.calibration import alps, sparsegpt, statistics
from prunectl.calibration.im2col import scatter_rows, weight_matrix
from prunectl.calibration.least_squares import least_squares_refit, normal_equations
from prunectl.calibration.session import BlockwiseCalibration, Calibration, CrossInputs
from prunectl.calibration.sparsegpt import ColumnBlock
from prunectl.calibration.statistics import (
    CrossStatistics,
    Float64Array,
    InputStatistics,
    OutputRange,
    count_outputs,
    covers_all_outputs,
)
from prunectl.formats.base import Array, ModelFile, Role, Tensor
from prunectl.formats.patch import in_storage_order, is_writable
from prunectl.pruning import engine
from prunectl.pruning.engine import PrunedTensors, PruningMethod
from prunectl.pruning.masks import Mask, NonFinitePolicy
from prunectl.pruning.plan import Plan, Selection
from prunectl.training.backend import WeightUse

_NAMES = (("pointwise_kernel", "bias"), ("kernel", "bias"), ("weight", "bias"), ("Weight", "Bias"))


def correct_bias(dense_means: Float64Array, means: Float64Array, bias: Array) -> Array:
    """Bias correction: add the difference of the mean outputs before and after pruning."""
    return np.asarray(bias + (dense_means - means).reshape(bias.shape)).astype(bias.dtype)


def mean_outputs(sums: InputStatistics, weights: Array) -> Float64Array:
    """Mean of each output of a layer, without its bias."""
    wide = weights.astype(np.float64)
    parts = {
        use.outputs or (0, 0): np.einsum("gof,gf->go", weight_matrix(wide, use), sums.totals[part] / sums.counts[part])
        for part, use in sums.uses.items()
    }
    return np.concatenate([parts[outputs].reshape(-1) for outputs in sorted(parts)])


def bias_of(model: ModelFile, tensor: Tensor) -> Tensor | None:
    """The bias that belongs to a kernel; None if several could, or if it cannot be written."""
    expected = {tensor.name.replace(*pair) for pair in _NAMES if pair[0] in tensor.name}
    layer = [candidate for candidate in model.tensors if candidate.layer == tensor.layer and candidate.is_float]
    biases = [candidate for candidate in layer if candidate.role is Role.BIAS]
    # In a layer with several kernels, such as a separable convolution, the bias may belong to another kernel.
    is_shared = any(candidate.role is Role.KERNEL and candidate.name != tensor.name for candidate in layer)
    matches = [candidate for candidate in biases if candidate.name in expected] or (
        [] if is_shared and tensor.role is Role.KERNEL else biases
    )
    return matches[0] if len(matches) == 1 and is_writable(matches[0]) else None


def center(products: Float64Array, first: Float64Array, second: Float64Array, count: int) -> Float64Array:
    """The centred Gram matrix, for a layer whose bias absorbs the means."""
    return products - first[:, :, np.newaxis] * second[:, np.newaxis] / count


DAMP = 0.01
BLOCK = 128
CrossByOutputs = Mapping[OutputRange, CrossStatistics]
Fit = tuple[Float64Array, Mask]
"""Reconstructed weights, and the mask of what was pruned."""
Solved = tuple[Array, Mask]
"""Reconstructed weights in the data type of the tensor, and the mask of what was pruned."""


Rank = Callable[[Mapping[str, Array]], PruningMethod]
"""Computes scores of changed weights, and returns the method with these scores."""


def stage_plans(plan: Plan, stages: int) -> Iterator[Plan]:
    """The plan split into stages, each of which keeps the same share of the weights that the previous stage kept."""
    kept = 1 - plan.drop / plan.size
    for stage in range(1, stages if plan.drop else 1):
        yield scaled(plan, (1 - kept ** (stage / stages)) / (1 - kept))
    yield plan


def scaled(plan: Plan, share: float) -> Plan:
    """A plan that prunes a share of the weights that this one prunes."""
    cuts = tuple(replace(cut, drop=None if cut.drop is None else int(cut.drop * share)) for cut in plan.cuts)
    return replace(plan, cuts=cuts, drop=int(plan.drop * share))


@dataclass(slots=True)
class Reconstructor:
    """Prunes by SparseGPT or ALPS and reconstructs by least squares, tensor by tensor in data order."""

    calibration: Calibration
    strategy: str
    """`obs` or `alps`, which choose the pruned weights of each layer themselves; empty if scores chose them before."""
    is_repaired: bool
    damp: float = DAMP
    block: int = BLOCK
    stages: int = 1
    """The number of passes in which weights are pruned; each sees the layer inputs that the previous one left."""
    rank: Rank | None = None
    """Ranks the weights again in each later stage, where they are ranked over all layers."""
    skipped: list[str] = field(default_factory=list)
    """Tensors whose inputs were not observed."""
    biases: dict[str, Array] = field(default_factory=dict)
    """Corrected biases."""
    is_behind_pruned: bool = False
    """Whether the inputs come from blocks that are pruned already."""

    def solve(self, model: ModelFile, plan: Plan, method: PruningMethod) -> PrunedTensors:
        """The pruned and reconstructed tensors of a plan."""
        solved = self.fit(model, plan, method)
        blocks = [partial(solved_blocks, cut.tensor, *solved[cut.tensor.name]) for cut in plan.cuts]
        return PrunedTensors(blocks, dict(self.biases))

    def fit(self, model: ModelFile, plan: Plan, method: PruningMethod) -> dict[str, Solved]:
        """The pruned and reconstructed weights by tensor."""
        dense = {cut.tensor.name: np.array(model.read(cut.tensor)) for cut in plan.cuts}
        self._begin(model, dense)
        # Behind pruned blocks the inputs have changed already: the dense inputs are those of the reference.
        reference = self.calibration.reference if self.is_behind_pruned else None
        dense_model = self.calibration if reference is None else replace(self.calibration, network=reference)
        input_sums = dense_model.accumulate([cut.tensor for cut in plan.cuts], statistics.sum_inputs)
        for name, sums in input_sums.items():
            # Checked before the first layer is solved, rather than after an hour.
            groups, features = sums.size
            statistics.check_memory(name, groups=groups, features=features, kept=2)
        current, solved = dense, dict[str, Solved]()
        for stage in stage_plans(plan, self.stages):
            if solved:
                current = {name: values for name, (values, _) in solved.items()}
                self._restore_biases(model)
                method = self.rank(current) if self.rank is not None else method
            kept = engine.keep_masks(model, stage, method, Selection((), (), {}), dict(current))
            start = {name: (current[name], ~mask) for name, mask in kept.items()}
            solved = self._fit_in_order(model, stage, method, start, dense=dense, sums_by_name=input_sums)
        return solved

    def _fit_in_order(
        self,
        model: ModelFile,
        plan: Plan,
        method: PruningMethod,
        start: Mapping[str, Solved],
        *,
        dense: Mapping[str, Array],
        sums_by_name: Mapping[str, InputStatistics],
    ) -> dict[str, Solved]:
        """Fit the tensors one by one in data order; those without captured inputs come last."""
        tensors = {cut.tensor.name: cut.tensor for cut in plan.cuts}
        order = [*sums_by_name, *(name for name in tensors if name not in sums_by_name)]
        self.skipped.clear()
        solved: dict[str, Solved] = {}
        for number, name in enumerate(order):
            tensor, weights, inputs = tensors[name], dense[name], sums_by_name.get(name)
            bias = (
                _correctable_bias(model, tensor, inputs, tensors) if self.is_repaired and inputs is not None else None
            )
            if inputs is not None and np.isfinite(weights).all() and covers_all_outputs(tensor.shape, inputs):
                cross = self.calibration.cross_inputs(tensor, order[number + 1 : len(sums_by_name)])
                values, dropped = self._fit(tensor, weights, start[name], method, cross, has_bias=bias is not None)
            else:
                cross = None
                self.skipped.append(name)
                dropped = start[name][1]
                keeps = ~dropped & (np.isfinite(weights) | (method.not_finite is not NonFinitePolicy.ZERO))
                values = np.where(keeps, weights, np.zeros((), weights.dtype))
            solved[name] = np.where(dropped, 0, values).astype(tensor.dtype), dropped
            self.calibration.network.assign({name: solved[name][0]})
            if bias is not None and inputs is not None:
                sums = self.calibration.sums_after(tensor, cross)
                self._correct(model, bias, mean_outputs(inputs, weights), mean_outputs(sums, solved[name][0]))
        return solved

    def _begin(self, model: ModelFile, weights: Mapping[str, Array]) -> None:
        """Reset the model to its dense weights: a search for a size calls `solve` repeatedly."""
        self.calibration.network.assign(weights)
        self._restore_biases(model)

    def _restore_biases(self, model: ModelFile) -> None:
        biases = {tensor.name: np.array(model.read(tensor)) for tensor in model.tensors if tensor.name in self.biases}
        self.calibration.network.assign(biases)
        self.biases.clear()

    def _correct(self, model: ModelFile, bias: Tensor, dense_means: Float64Array, means: Float64Array) -> None:
        """Correct the bias of a layer by the change of its mean outputs."""
        before = self.biases[bias.name] if bias.name in self.biases else np.array(model.read(bias))
        if before.size == means.size:
            self.biases[bias.name] = correct_bias(dense_means, means, before)
            self.calibration.network.assign({bias.name: self.biases[bias.name]})

    def _fit(
        self,
        tensor: Tensor,
        weights: Array,
        start: Solved,
        method: PruningMethod,
        cross: CrossInputs,
        *,
        has_bias: bool,
    ) -> Fit:
        """Prune a tensor whose inputs are observed, and refit it to its dense outputs from its current weights."""
        values: Float64Array = weights.astype(np.float64)
        initial: Float64Array = start[0].astype(np.float64)
        dropped = start[1]
        if self.strategy and _supports_obs(tensor, method, cross.sums):
            drop = int(np.count_nonzero(dropped))
            initial, dropped = self._prune_by_obs(values, initial, cross.statistics, drop, method)
        # Zeros stay zero, even where there are more of them than weights to prune.
        return self._refitted(values, initial, dropped | (weights == 0), cross.statistics, has_bias=has_bias), dropped

    def _prune_by_obs(
        self,
        dense: Float64Array,
        values: Float64Array,
        cross_statistics: CrossByOutputs,
        drop: int,
        method: PruningMethod,
    ) -> Fit:
        """Prune by SparseGPT, column by column, or by ALPS; return the updated weights and the mask."""
        dropped: Mask = np.zeros(values.shape, np.bool_)
        size, pattern = values.size, method.pattern
        values_now, pruned_count, weights_seen = values, 0, 0
        for pairs in cross_statistics.values():
            use = pairs.use
            rows, dense_rows = weight_matrix(values, use), weight_matrix(dense, use)
            new, pruned = np.empty_like(rows), np.zeros(rows.shape, np.bool_)
            for group, total in enumerate(pairs.gram):
                outputs, features = rows.shape[1:]
                weights_seen += outputs * features
                count = drop * weights_seen // size - pruned_count
                pruned_count += count
                parts: list[ColumnBlock] = []
                if isinstance(pattern, NMPattern):
                    channels = features if use.window is None else _input_channels(values, use)
                    parts = sparsegpt.nm_blocks(features, channels, pattern.zeros, pattern.group)
                if self.strategy == "alps":
                    project = alps.lowest_in(parts) if parts else alps.lowest(count)
                    gram, target = normal_equations(dense_rows[group], total, pairs.cross_gram[group], self.damp)
                    new[group], pruned[group] = alps.prune_rows(rows[group], gram, target, project)
                    continue
                parts = parts or sparsegpt.unstructured_blocks(outputs, features, count, self.block)
                new[group], pruned[group] = sparsegpt.prune_rows(rows[group], total, parts, self.damp, self.block)
            values_now, dropped = scatter_rows(new, use, values_now), scatter_rows(pruned, use, dropped)
        return values_now, dropped

    def _refitted(
        self,
        values: Float64Array,
        initial: Float64Array,
        dropped: Mask,
        cross_statistics: CrossByOutputs,
        *,
        has_bias: bool,
    ) -> Float64Array:
        """Refit the kept weights by least squares to the dense outputs of the layer."""
        result = initial
        for pairs in cross_statistics.values():
            rows, initial_rows, kept = (
                weight_matrix(values, pairs.use),
                weight_matrix(initial, pairs.use),
                ~weight_matrix(dropped, pairs.use),
            )
            gram, cross_gram = pairs.gram, pairs.cross_gram
            if has_bias:
                gram = center(gram, pairs.sum_pruned, pairs.sum_pruned, pairs.count)
                cross_gram = center(cross_gram, pairs.sum_pruned, pairs.sum_dense, pairs.count)
            new = [
                least_squares_refit(
                    rows[group], gram[group], cross_gram[group], kept[group], self.damp, initial=initial_rows[group]
                )
                for group in range(len(rows))
            ]
            result = scatter_rows(np.stack(new), pairs.use, result)
        return result


@dataclass(slots=True)
class BlockwiseReconstructor(Reconstructor):
    """Reconstructs a model of which one block at a time is in memory; the results are kept in a temporary file."""

    def fit(self, model: ModelFile, plan: Plan, method: PruningMethod) -> dict[str, Solved]:
        """The pruned and reconstructed weights by tensor."""
        assert isinstance(self.calibration, BlockwiseCalibration)
        self.skipped.clear()
        self.biases.clear()
        with closing(_ArraysInFile()) as arrays:
            for number, part in self.calibration.parts(has_reference=True):
                own = tuple(cut for cut in plan.cuts if self.calibration.network.part_of(cut.tensor.name) == number)
                if not own:
                    continue
                block = Reconstructor(
                    part,
                    self.strategy,
                    self.is_repaired,
                    self.damp,
                    self.block,
                    self.stages,
                    is_behind_pruned=number > 0,
                )
                for name, (values, dropped) in block.fit(model, replace(plan, cuts=own), method).items():
                    arrays.add(name, values, dropped)
                self.skipped += block.skipped
                self.biases |= block.biases
            return arrays.views()


_ALIGNMENT = 64


class _ArraysInFile:
    """Tensors in one unnamed temporary file, memory-mapped once: a file for each could exceed the open-file limit."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="prunectl-")  # noqa: SIM115 - closed by close
        self._places: dict[str, list[tuple[int, np.dtype[Any], tuple[int, ...]]]] = {}

    def add(self, name: str, *arrays: Array) -> None:
        """Append the arrays of a tensor to the file."""
        for array in arrays:
            begin = self._file.tell()
            self._places.setdefault(name, []).append((begin, array.dtype, array.shape))
            self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            self._file.write(bytes(-self._file.tell() % _ALIGNMENT))

    def close(self) -> None:
        """Close the file; views of it stay valid."""
        self._file.close()

    def views(self) -> dict[str, Solved]:
        """Read-only views of all arrays, by tensor."""
        self._file.flush()
        whole = np.memmap(self._file, np.uint8, "r") if self._places else np.zeros(0, np.uint8)
        return {
            name: tuple(  # type: ignore[misc]
                whole[begin : begin + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
                for begin, dtype, shape in places
            )
            for name, places in self._places.items()
        }


def _correctable_bias(
    model: ModelFile, tensor: Tensor, statistics: InputStatistics, pruned: Collection[str]
) -> Tensor | None:
    """The bias of a tensor, if it has a number for each observed output and is not pruned itself; else None."""
    bias = bias_of(model, tensor)
    if bias is None or bias.name in pruned or bias.size != count_outputs(tensor.shape, statistics):
        return None
    return bias


def _supports_obs(tensor: Tensor, method: PruningMethod, inputs: InputStatistics) -> bool:
    """Whether OBS can prune column by column: unstructured, or N:M with its groups along the input axis."""
    if method.pattern is None:
        return True
    return isinstance(method.pattern, NMPattern) and all(
        use.in_axis == tensor.reduction_axis and use.shape is None for use in inputs.uses.values()
    )


def _input_channels(values: Array, use: WeightUse) -> int:
    return 1 if use.in_axis is None else values.shape[use.in_axis]


def solved_blocks(tensor: Tensor, values: Array, dropped: Mask) -> Iterator[Solved]:
    """Yield a solved tensor as a single block, in the order of its storage."""
    yield in_storage_order(tensor, values), in_storage_order(tensor, dropped)
